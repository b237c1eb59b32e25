"""Results and contents of reports, invented: of searches, and of more models than a test could merge."""

import random
from collections.abc import Sequence

from worker.engine.catalog.contracts.report import (
    Candidate,
    CandidateMetric,
    Difference,
    FailedTrial,
    MergeResult,
    MetricResult,
    ModelResult,
    Search,
    Stopping,
    StoppingPoint,
    Timings,
    Trial,
)
from worker.engine.reporting.contents import (
    Construction,
    Contents,
    InterferenceReport,
    LayerInterference,
    Maps,
    NodeMap,
    PairInterference,
    Spread,
    TensorGroup,
    VocabularyReport,
)

UGLY = "<script>alert(1)</script>&\"'"


def invented_metric(rng: random.Random) -> MetricResult:
    expert, average, kept, merged = (rng.uniform(0.5, 0.95) for _ in range(4))
    intervals = {"expert": expert, "average": average, "merged_kept_head": kept, "merged": merged}
    difference = Difference(value=0.01, interval=(-0.02, 0.04))
    return MetricResult.model_validate(
        {
            "metric": "accuracy",
            "examples": 500,
            **intervals,
            "retention": merged / expert,
            "interval": (merged - 0.03, merged + 0.03),
            "intervals": {version: (value - 0.03, value + 0.03) for version, value in intervals.items()},
            "differences": dict.fromkeys(("expert", "average", "merged_kept_head"), difference),
        }
    )


def invented_result(names: Sequence[str], *, trials: int = 40, seed: int = 0) -> MergeResult:
    """As of `auto`, with everything that a result may have."""
    rng = random.Random(seed)
    metrics = {name: invented_metric(rng) for name in names}
    tried = ("mask_fisher", "ties", "regmean", "linear", "slerp", "della", "karcher")
    candidates = []
    for number, name in enumerate([*tried, "average", f"expert {names[0]}"]):
        kept = {model: rng.uniform(0.8, 1.0) for model in names}
        candidates.append(
            Candidate(
                name=name,
                kind="method" if name in tried else "average" if name == "average" else "expert",
                method={"name": name},
                weights=dict.fromkeys(names, 1.0),
                align_ridge=0.1,
                trial=number,
                metrics={
                    model: CandidateMetric(metric="accuracy", value=r * 0.9, interval=(r - 0.2, r), retention=r)
                    for model, r in kept.items()
                },
                mean_retention=sum(kept.values()) / len(kept),
                min_retention=min(kept.values()),
                behind=Difference(value=0.01 * number, interval=(0.01 * number - 0.02, 0.01 * number + 0.02)),
                chosen=number == 0,
            )
        )
    found = [
        Trial(
            number=number,
            candidate=tried[number % len(tried)],
            parameters={"scale": rng.uniform(0.5, 1.5), "floor": 10 ** rng.uniform(-4, -1), UGLY: UGLY},
            rows=256,
            retentions=dict.fromkeys(names, 0.9),
            smoothed=dict.fromkeys(names, 0.88),
            objective=rng.uniform(0.8, 0.95),
            pruned=number % 4 == 3,
            seconds=1.5,
        )
        for number in range(trials)
    ]
    return MergeResult(
        models=[
            ModelResult(
                name=name,
                checkpoint=f"local:{name}",
                digest="sha256:" + "0" * 64,
                examples=512,
                score_seconds=1.0,
                score_cached=False,
                aligned_examples=128,
                weight_share=1 / len(names),
                weight_error=0.05,
                parameters={},
            )
            for name in names
        ],
        metrics=metrics,
        mean_retention=0.97,
        min_retention=0.9,
        candidates=candidates,
        search=Search(
            objective="mean_retention",
            search_rows=dict.fromkeys(names, 256),
            held_out_rows=dict.fromkeys(names, 250),
            min_retention={names[0]: 0.85},
            feasible=True,
            chosen=0,
            trials=found,
            failed=[FailedTrial(number=trials, candidate=UGLY, parameters={UGLY: UGLY}, seconds=0.1, error=UGLY)],
        ),
        stopping=Stopping(
            tolerance=0.1,
            reached=True,
            curve=[
                StoppingPoint(
                    examples=rows, error=error, errors={"layers.0.heads": error, "layers.0.neurons": error / 3}
                )
                for rows, error in ((256, 0.2), (512, 0.14), (1024, 0.09))
            ],
        ),
        method={"name": "mask_fisher", "floor": 0.001, "note": UGLY},
        timings=Timings(load_seconds=1.5, score_seconds=30.0, merge_seconds=2.5, evaluate_seconds=8.25),
        peak_memory_bytes=1_230_000_000,
        device="cpu",
        notes=[f"a note with {UGLY}"],
    )


def invented_contents(
    names: Sequence[str], *, rows: int = 12, columns: int = 48, models: int | None = None
) -> Contents:
    """Maps of so many `rows` and `columns`, of the first `models` models."""
    rng = random.Random(1)
    shown = list(names[:models])

    def grid(width: int) -> list[list[float | None]]:
        return [[rng.lognormvariate(-8, 1) for _ in range(width)] for _ in range(rows)]

    def spread() -> Spread:
        return Spread(mean=0.2, least=0.1, most=0.3)

    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return Contents(
        construction=Construction(
            groups=[
                TensorGroup(
                    kind="query", owner="heads", outside_layers=False, copied=False, tensors=24, values=10**6,
                    dtypes=["float32"],
                )
            ],
            heads="aligned",
            dtype="float32",
            vocabulary=VocabularyReport(
                owner=UGLY, rows=30_000, tokens=29_990, new=12, shared=dict.fromkeys(names, 29_000)
            ),
            bytes_read=10**9,
            bytes_written=10**8,
        ),
        maps=Maps(
            models=shown,
            left_out=len(names) - len(shown),
            maps=[
                NodeMap(
                    nodes=nodes,
                    layers=96,
                    count=128 * (1 + 20 * (nodes == "neurons")),
                    scores={name: grid(columns) for name in shown},
                    weights={name: grid(columns) for name in shown},
                    lambdas=dict.fromkeys(shown, 1 / len(names)),
                )
                for nodes in ("heads", "neurons")
            ],
        ),
        interference=InterferenceReport(
            share_read=0.3,
            layers=[LayerInterference(layer=n, cosine=spread(), sign_conflicts=spread()) for n in (*range(rows), None)],
            pairs=[PairInterference(models=pair, cosine=0.2, sign_conflicts=0.4) for pair in pairs[:45]],
            pairs_in_all=len(pairs),
        ),
        threads=2,
        versions={"python": "3.11"},
    )  # fmt: skip

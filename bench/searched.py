"""A job's result that is as long as those of searches are."""

from worker.engine.catalog.contracts.report import MergeResult, MetricResult, ModelResult, Search, Timings, Trial


def searched(trials: int) -> MergeResult:
    """The result of a search over five experts."""
    names = [f"expert-{number}" for number in range(5)]
    kept = dict.fromkeys(names, 0.987654321)
    return MergeResult(
        models=[
            ModelResult(
                name=name, checkpoint=f"local:experts/{name}", digest="0" * 64, examples=2048, weight_share=0.2,
                score_seconds=12.3, score_cached=False, batch_tokens=4096, aligned_examples=512,
                parameters={},
            )
            for name in names
        ],
        metrics={
            name: MetricResult(
                metric="accuracy", expert=0.9, average=0.8, merged=0.88, merged_kept_head=0.87, retention=0.977,
                interval=(0.86, 0.9),
                examples=800, intervals={}, differences={},
            )
            for name in names
        },
        mean_retention=0.977,
        min_retention=0.977,
        search=Search(
            objective="mean_retention", search_rows=dict.fromkeys(names, 400), held_out_rows=dict.fromkeys(names, 400),
            min_retention={}, feasible=True, chosen=0, failed=[],
            trials=[
                Trial(
                    number=number, candidate="mask_fisher", parameters={"scale": 1.234567}, seconds=1.25,
                    rows=400, retentions=kept, smoothed=kept, objective=0.987654321, pruned=False,
                )
                for number in range(trials)
            ],
        ),
        method={"name": "mask_fisher"}, timings=Timings(), peak_memory_bytes=1, device="cpu", notes=[],
    )  # fmt: skip

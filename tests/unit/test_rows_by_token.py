"""What was measured of a token-indexed tensor, at the output's rows."""

import torch
from torch import Tensor

from worker.engine.merging.token_rows import ByToken


class Counted:
    """A tensor that counts the rows that are asked for."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.read = 0

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, rows: slice, /) -> Tensor:
        self.read += rows.stop - rows.start
        return self.values[rows]


def test_rows_lie_where_the_output_has_their_tokens_and_no_others_are_read() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, bias = Counted(torch.rand(6, 3, generator=generator)), torch.rand(4, generator=generator)
    places = [5, 0, 1, -1, 3, 4, -1]
    moved = ByToken({"embeddings": embeddings, "bias": bias}, {"embeddings": places})
    expected = torch.stack([torch.zeros(3) if place < 0 else embeddings.values[place] for place in places])
    rows = moved["embeddings"]
    assert tuple(rows.shape) == (7, 3)
    for start, stop in ((0, 7), (1, 4), (3, 4), (5, 7)):
        embeddings.read = 0
        assert torch.equal(rows[start:stop], expected[start:stop])
        assert embeddings.read == sum(place >= 0 for place in places[start:stop])
    assert moved["bias"] is bias

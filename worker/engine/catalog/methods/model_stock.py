"""`model_stock`: between the base and the models' mean, the nearer to the mean the more the models agree."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DataDecidesParameters


class ModelStockParameters(DataDecidesParameters):
    name: Literal["model_stock"] = "model_stock"
    filter_wise: bool = False
    """Whether the distance from the base is found for each slice of a tensor along its first axis, instead of for the
    whole; tensors of one axis or none are one slice."""


MODEL_STOCK = MethodEntry(
    name="model_stock",
    formula="theta = t mean_j theta_j + (1 - t) theta_0, t = N c / (1 + (N - 1) c), "
    "c = max(0, mean_(j < k) cos(theta_j - theta_0, theta_k - theta_0)) of each tensor, N models",
    source="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522",
    needs=("base",),
    parameters=ModelStockParameters,
    models=(2, None),
    search={"scale": Range(0.8, 1.25)},
)

"""The recipe: stages, the pipeline that runs and resumes them, DeepSeek-R1's six."""

from r1kern.stages.pipeline import Context, Pipeline, Result, Stage
from r1kern.stages.recipe import deepseek_r1

__all__ = ["Context", "Pipeline", "Result", "Stage", "deepseek_r1"]

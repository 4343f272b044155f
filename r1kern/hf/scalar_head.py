"""Reward and value models: a scalar head, `...ForSequenceClassification` with one label.

The model's configuration says which head it has, so that names, shapes, sync plans and exports
follow from it as they do for a language model.
"""

from __future__ import annotations

import copy

from transformers import PretrainedConfig

SCORE = "score.weight"
_CLASSIFIER = "ForSequenceClassification"


def has_scalar_head(hf: PretrainedConfig) -> bool:
    """Whether the model ends in `score.weight` [1, H] instead of a language-model head."""
    return (hf.architectures or [""])[0].endswith(_CLASSIFIER)


def with_scalar_head(hf: PretrainedConfig) -> PretrainedConfig:
    """The same model with a scalar head: no head tied to the embedding, no further prediction."""
    hf = copy.deepcopy(hf)
    hf.architectures = [_classifier(hf.model_type)]
    hf.num_labels = 1
    hf.tie_word_embeddings = False
    if hasattr(hf, "num_nextn_predict_layers"):
        hf.num_nextn_predict_layers = 0
    return hf


def describe_scalar_head(config: dict) -> dict:
    """A language model's `config.json` as that of the same model with a scalar head.

    "regression" is transformers' word for one label without an activation; without it vLLM would
    put scores through a sigmoid.
    """
    dropped = {"num_labels", "num_nextn_predict_layers", "num_mtp_layers"}
    return {key: value for key, value in config.items() if key not in dropped} | {
        "architectures": [_classifier(config["model_type"])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
        "tie_word_embeddings": False,
    }


def _classifier(model_type: str) -> str:
    family = {"deepseek_v3": "DeepseekV3", "qwen2": "Qwen2", "llama": "Llama"}[model_type]
    return family + _CLASSIFIER

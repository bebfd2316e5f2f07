"""An option that was given and can't do anything says what it needs."""

from __future__ import annotations

from typing import Any

import pytest

from avalanche_fmlora.strategies.config import MethodConfig, idle_options


@pytest.mark.parametrize(
    ("method", "options", "idle"),
    [
        ("seq_lora", {"whitening": 0.3, "row_transport": True}, ["row_transport", "whitening"]),
        ("seq_lora", {"whitening": 0.3, "classifier": "class_mean"}, []),
        ("seq_lora", {"recurring_rows": "mean", "classifier": "imprinted"}, ["recurring_rows"]),
        ("seq_lora", {"classifier": "class_mean", "whitening_covariance": "running"}, ["whitening_covariance"]),
        ("seq_lora", {"classifier": "class_mean", "transport_ridge": 1.0}, ["transport_ridge"]),
        ("seq_lora", {"logit_scale": 8.0}, ["logit_scale"]),
        ("seq_lora", {"momentum": 0.5}, ["momentum"]),
        ("seq_lora", {"momentum": 0.5, "optimizer": "sgd"}, []),
        ("fm_lora", {"prompt_length": 0, "meta_prompt": {"rate_share": 0.5}}, ["meta_prompt"]),
        ("fm_lora", {"classifier": "linear", "whitening": None, "row_transport": False}, []),
        ("fm_lora", {"classifier": "linear"}, []),
        ("fm_lora", {"whitening_covariance": "running"}, []),
    ],
)
def test_what_has_no_effect_is_named(
    method: str, options: dict[str, Any], idle: list[str], make_vit: Any, caplog: Any
) -> None:
    from avalanche_fmlora.strategies.registry import method as method_class

    cls = method_class(method)
    options |= {"rank": 4} if method == "fm_lora" else {}
    cls(model=make_vit(), evaluator=None, **options)
    said = [message for message in caplog.messages if "has no effect here" in message]
    assert sorted(message.partition("=")[0] for message in said) == idle
    caplog.clear()
    cls(model=make_vit(), evaluator=None, config=cls.config_class(**options))
    assert [message for message in caplog.messages if "has no effect here" in message] == said, "as a configuration too"


def test_the_line_names_value_and_mend() -> None:
    config = MethodConfig(recurring_rows="per_experience")
    assert idle_options(config, ["recurring_rows"]) == [
        "recurring_rows='per_experience' has no effect here: it needs classifier='class_mean'."
    ]

"""What a run is told: defaults, checks, and the way to a file and back."""

from typing import Any

import pytest
from pydantic import ValidationError

from shared import config as configs
from shared.errors import ConfigError
from train.config import TrainConfig
from train.method import find, names

LEAST: dict[str, Any] = {"wiring": {"latents": 64}, "method": {"name": "topk"}, "steps": 10}


def parsed(*settings: str) -> TrainConfig:
    return configs.parse(TrainConfig, configs.override(LEAST, settings))


def test_a_wiring_size_a_method_and_steps_are_enough() -> None:
    config = parsed()
    assert (config.wiring.kind, config.wiring.exclusive, config.seed) == ("crosscoder", 0.05, 0)
    assert config.method == find("topk")()


def test_a_method_may_be_its_name_alone() -> None:
    assert configs.parse(TrainConfig, {**LEAST, "method": "standard"}).method == find("standard")()
    assert parsed("method=batch_topk").method.name == "batch_topk"


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("exclusive", ["3", "0.125", "{ a = 3, b = 0.25 }"])
def test_a_config_comes_back_from_its_file_as_it_was(name: str, exclusive: str) -> None:
    config = configs.parse(
        TrainConfig, configs.override({**LEAST, "method": name}, [f"wiring.exclusive={exclusive}", "batch=7"])
    )
    again = configs.parse(TrainConfig, configs.override({}, []) | _read(configs.to_toml(config)))
    assert again == config and type(again.method) is type(config.method)
    assert configs.fingerprint(again.model_dump(mode="json")) == configs.fingerprint(config.model_dump(mode="json"))
    assert type(again.wiring.exclusive) is type(config.wiring.exclusive)  # 1 is a latent, 1.0 is a share


def _read(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def test_every_key_of_the_method_is_in_the_file() -> None:
    text = configs.to_toml(parsed("method.k=3", "method.k_start=7"))
    assert 'name = "topk"' in text and "k = 3" in text and "k_start = 7" in text and "aux = " in text


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parsed().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepps=5", r"unknown key: stepps\. Did you mean steps"),
        ("wiring.latent=5", r"unknown key: wiring\.latent\. Did you mean wiring\.latents"),
        ("method.kk=5", r"unknown key: method\.kk\. "),
        ("method.name=topkk", r"unknown method: topkk\. Did you mean topk"),
        ("method=5", r"wrong value for method: 5\. "),
        ("method=[]", r"wrong value for method: \[\]\. "),
        ("wiring.kind=sae", r"wrong value for wiring\.kind: 'sae'\. .*autoencoder"),
        ("wiring.exclusive=some", r"wrong value for wiring\.exclusive"),
        ("wiring.latents=0", r"wrong value for wiring\.latents: 0\. "),
        ("wiring.norm=max", r"wrong value for wiring\.norm: 'max'\. "),
        ("scale.kind=mean", r"wrong value for scale\.kind: 'mean'\. "),
        ("steps=0", r"wrong value for steps: 0\. "),
        ("batch=many", r"wrong value for batch: 'many'\. "),
        ("optimiser.decay=2", r"wrong value for optimiser\.decay: 2\. "),
        ("log.every=0", r"wrong value for log\.every: 0\. "),
        ("threads=0", r"wrong value for threads: 0\. "),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_its_key(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parsed(setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["wiring", "method", "steps"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"missing key: {key}"):
        configs.parse(TrainConfig, {name: value for name, value in LEAST.items() if name != key})

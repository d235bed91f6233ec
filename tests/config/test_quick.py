"""The settings of a quick run: never longer than the configuration's own, and never over what was asked for by name."""

from __future__ import annotations

from npt.config import QUICK, left_out, load_config, shortened


def test_a_quick_run_calibrates_on_little_text() -> None:
    config = shortened(load_config())
    for key, value in QUICK.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == value
    assert config.training.num_train_steps == 0 and config.training.calibrate
    assert config.data.num_calibration_samples + 1 <= config.data.num_train_samples


def test_it_is_no_longer_than_the_configuration() -> None:
    sizes = ["data.num_train_samples=50", "data.num_calibration_samples=10", "data.num_eval_samples=9"]
    data = shortened(load_config(None, sizes)).data
    assert (data.num_train_samples, data.num_calibration_samples, data.num_eval_samples) == (50, 10, 9)


def test_all_of_a_text_becomes_some_of_it() -> None:
    options = ["data.dataset_name=text", "data.data_files=[a.txt]", "data.num_train_samples=null"]
    assert shortened(load_config(None, options)).data.num_train_samples == QUICK["data.num_train_samples"]


def test_what_was_named_is_kept() -> None:
    options = ["training.num_train_steps=5", "data.num_eval_samples=300"]
    config = load_config(None, options)
    short = shortened(config, kept={"training.num_train_steps", "data.num_eval_samples"})
    assert (short.training.num_train_steps, short.data.num_eval_samples) == (5, 300)


def test_each_difference_is_told() -> None:
    whole = load_config(None, ["data.num_eval_samples=8", "training.calibrate=false"])
    assert list(left_out(shortened(whole), whole)) == [
        "training.calibrate=True in place of False",
        "training.num_train_steps=0 in place of null",
        "data.num_train_samples=96 in place of 512",
        "data.num_calibration_samples=64 in place of 384",
        "data.num_detail_samples=4 in place of 32",
    ]

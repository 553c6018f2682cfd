from pathlib import Path

import imageio.v3 as iio
import numpy as np

from ript_ray.evaluation import before_and_after
from ript_ray.reporting import describe_summary, plot_success, versions, write_json, write_video
from ript_ray.types import Context


def test_a_run_is_shown_as_curve_video_and_words(tmp_path: Path) -> None:
    contexts = [Context("libero_object/0", state, 1) for state in range(5)]
    summary = {
        "env": "libero_object/0",
        "evaluation": {
            "held_out": before_and_after(contexts, [True, False, False, False, None], [True, True, True, False, True]),
            "shifted": before_and_after([], [], []),
        },
        "updates": 2,
        "episodes": 24,
        "env_steps": 2400,
        "groups": {"accepted": 3, "rejected": 1},
        "seconds": {"total": 100, "rollout": 70, "learner_busy": 20, "learner_idle": 10},
        "errors": ["an actor died"],
        "versions": versions("egl"),
    }
    rows = [
        {"update": 1, "rollout/success_rate": 0.25, "rollout/success_low": 0.1, "rollout/success_high": 0.6},
        {"update": 1, "learner/loss": 1.0},
        {"update": 2, "rollout/success_rate": 0.5, "rollout/success_low": 0.2, "rollout/success_high": 0.8},
    ]
    plot_success(tmp_path / "success.png", summary, rows)
    assert iio.imread(tmp_path / "success.png").std() > 0
    text = describe_summary(summary)
    assert "held out         25% (1/4, 95 % interval 5%–70%) → 75% (3/4" in text
    assert "shifted          not measured" in text
    assert "1 faults survived" in text
    write_json(tmp_path / "summary.json", summary)
    assert (tmp_path / "summary.json").read_text().startswith("{")
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "video.mp4", frames, 10.0)
    assert iio.imread(tmp_path / "video.mp4").shape == (6, 64, 64, 3)

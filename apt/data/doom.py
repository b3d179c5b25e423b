"""First-person clips from ViZDoom, with captions of what the camera does and sees.

The clips show a camera moving through 3D scenes, for training from folders. The engine and the
scenes come with the package `vizdoom` (extra of the same name); this package ships no rendered
clips. A clip is a pure function of (seed, index, size) and the version of the engine.

A motion is drawn, played, and checked against the camera's position and heading. If the camera
moved differently, because a wall was in the way, the clip is drawn again, so captions are true.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from apt.data.dataset import Sample
from apt.errors import ConfigError, DataError, MissingPackageError

TICS_PER_SECOND = 35
_TICS_PER_FRAME = 4
FPS = Fraction(TICS_PER_SECOND, _TICS_PER_FRAME)

_WIDTH, _HEIGHT = 160, 120  # of the engine's picture
# Scenarios of the package, with descriptions.
_SCENES = {
    "my_way_home": "a maze of rooms",
    "health_gathering_supreme": "a stone maze",
    "deadly_corridor": "a brick corridor",
    "basic": "a small hall",
}
# The engine's names of things, with words for captions. Other things are not mentioned.
_THINGS = {
    "Zombieman": "a soldier",
    "ShotgunGuy": "a soldier",
    "ChaingunGuy": "a soldier",
    "Cacodemon": "a cacodemon",
    "GreenArmor": "green armour",
    "CustomMedikit": "a medikit",
}
_LEAST_HEIGHT = 6  # pixels; smaller things are not mentioned
_ATTEMPTS, _PATIENCE = 128, 8  # in total, and per scene and motion


@dataclass(frozen=True)
class _Motion:
    """The directions in which the camera moves and turns: -1, 0 or 1 for each."""

    forward: int = 0
    right: int = 0
    turn: int = 0

    @property
    def words(self) -> str:
        """The motion in words, such as "moves forward and turns left", or "stands still"."""
        words = (
            {1: "moves forward", -1: "moves backward"}.get(self.forward),
            {1: "slides right", -1: "slides left"}.get(self.right),
            {1: "turns right", -1: "turns left"}.get(self.turn),
        )
        return " and ".join(filter(None, words)) or "stands still"


_MOTIONS = (
    _Motion(),
    _Motion(forward=1),
    _Motion(forward=-1),
    *(
        motion
        for way in (-1, 1)
        for motion in (_Motion(right=way), _Motion(turn=way), _Motion(forward=1, turn=way))
    ),
)
_SPEED, _TURN = 4.0, (0.5, 1.2)
_SETTLE = 4 * _TICS_PER_FRAME  # until the speed is constant
# Limits per tic, in map units and in degrees: the minimum of an intended motion or turn, and the
# maximum of an unintended one. A camera that turns while walking drifts outwards.
_MOVED, _DRIFTED = 0.8, 0.5
_TURNED, _STEADY = 0.4, 0.1


class DoomClips:
    """Clips by index, of one size. A context manager, which stops the engines at its end.

    Args:
        seed: another seed gives another stream.
        frames: of a clip, at `FPS`.
        height, width: the centre of the engine's picture is scaled down to this size.

    Raises:
        MissingPackageError: if vizdoom is not installed.
        ConfigError: if a size is not positive, or larger than the engine's picture.
        DataError: if the engine does not run here.
    """

    def __init__(self, seed: int = 0, *, frames: int = 17, height: int = 64, width: int = 64):
        if frames < 1 or not 1 <= height <= _HEIGHT or not 1 <= width <= _WIDTH:
            raise ConfigError(
                f"{frames} frames of {width}x{height} cannot be rendered; use at least one frame "
                f"and at most {_WIDTH}x{_HEIGHT} pixels"
            )
        self.seed, self.frames, self.height, self.width = seed, frames, height, width
        self._vizdoom = _import_vizdoom()
        self._folder = tempfile.TemporaryDirectory()
        self._games: dict[str, Any] = {}

    def __enter__(self) -> DoomClips:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engines."""
        for game in self._games.values():
            game.close()
        self._games.clear()
        self._folder.cleanup()

    def __getitem__(self, index: int) -> Sample:
        """Return clip `index`: pixels (3, T, H, W) fp32 in [-1, 1], and its caption."""
        random = np.random.default_rng([self.seed, index])
        scene, motion = "", _MOTIONS[0]
        for attempt in range(_ATTEMPTS):
            if attempt % _PATIENCE == 0:
                scene = list(_SCENES)[int(random.integers(len(_SCENES)))]
                motion = _MOTIONS[int(random.integers(len(_MOTIONS)))]
            try:
                played = self._play(scene, motion, random)
            except self._errors() as error:
                raise DataError(f"vizdoom's engine stopped: {error}") from error
            if played is None:
                continue
            pictures, things = played
            caption = f"first-person view of {_SCENES[scene]}: the camera {motion.words}"
            if things:
                caption += f", {' and '.join(things)} in sight"
            return Sample(pixels=self._scaled(pictures), caption=caption)
        raise DataError(
            f"clip {index} could not be rendered in {_ATTEMPTS} attempts; use another --seed"
        )

    def _play(
        self, scene: str, motion: _Motion, random: np.random.Generator
    ) -> tuple[np.ndarray, list[str]] | None:
        """Return frames (T, H, W, 3) uint8 and things in sight; None if the motion differed."""
        game = self._games.get(scene) or self._start(scene)
        game.set_seed(int(random.integers(1 << 31)))
        game.new_episode()
        game.make_action([0.0, 0.0, float(random.uniform(-180, 180)) / _SETTLE], _SETTLE)
        turn = float(random.uniform(*_TURN)) * motion.turn
        action = [_SPEED * motion.forward, _SPEED * motion.right, turn]
        game.make_action(action, _SETTLE)
        pictures: list[np.ndarray] = []
        seen: Counter[str] = Counter()
        places: list[np.ndarray] = []
        for frame in range(self.frames):
            state = game.get_state()
            if state is None:  # the player has died
                return None
            pictures.append(state.screen_buffer.copy())
            places.append(np.array(state.game_variables))
            seen.update(
                {
                    _THINGS[label.object_name]
                    for label in state.labels
                    if label.object_name in _THINGS and label.height >= _LEAST_HEIGHT
                }
            )
            if frame + 1 < self.frames:
                game.make_action(action, _TICS_PER_FRAME)
        if not _did(motion, np.stack(places)):
            return None
        return np.stack(pictures), sorted(name for name in seen if 2 * seen[name] >= self.frames)

    def _start(self, scene: str) -> Any:
        vizdoom = self._vizdoom
        game = vizdoom.DoomGame()
        # The engine would otherwise write its settings to the working directory.
        game.set_doom_config_path(str(Path(self._folder.name) / f"{scene}.ini"))
        game.set_doom_scenario_path(str(Path(vizdoom.scenarios_path) / f"{scene}.wad"))
        game.set_doom_map("map01")
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for part in ("hud", "weapon", "crosshair", "decals", "particles", "messages",
                     "effects_sprites", "screen_flashes"):  # fmt: skip
            getattr(game, f"set_render_{part}")(False)
        game.set_labels_buffer_enabled(True)
        game.set_episode_timeout(0)
        buttons, variables = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons(
            [
                buttons.MOVE_FORWARD_BACKWARD_DELTA,
                buttons.MOVE_LEFT_RIGHT_DELTA,
                buttons.TURN_LEFT_RIGHT_DELTA,
            ]
        )
        game.set_available_game_variables(
            [variables.POSITION_X, variables.POSITION_Y, variables.ANGLE]
        )
        game.set_mode(vizdoom.Mode.PLAYER)
        # The engine creates folders in the directory where it is started.
        here = Path.cwd()
        os.chdir(self._folder.name)
        try:
            game.init()
        finally:
            os.chdir(here)
        self._games[scene] = game
        return game

    def _errors(self) -> tuple[type[Exception], ...]:
        names = ("ErrorException", "UnexpectedExitException", "IsNotRunningException")
        return tuple(getattr(self._vizdoom, f"ViZDoom{name}") for name in names)

    def _scaled(self, pictures: np.ndarray) -> torch.Tensor:
        """Crop the centre of the pictures and scale it to the clip's size."""
        scale = max(self.height / _HEIGHT, self.width / _WIDTH)
        height, width = round(self.height / scale), round(self.width / scale)
        top, left = (_HEIGHT - height) // 2, (_WIDTH - width) // 2
        cut = torch.from_numpy(pictures[:, top : top + height, left : left + width]).float()
        small = F.interpolate(
            cut.permute(0, 3, 1, 2), (self.height, self.width), mode="bilinear", antialias=True
        )
        return (small / 127.5 - 1).clamp(-1, 1).transpose(0, 1).contiguous()


def _did(motion: _Motion, places: np.ndarray) -> bool:
    """Return whether a camera at `places` (T, 3), x, y and heading in degrees, moved as intended.

    The motion must fit between every two frames.
    """
    if len(places) < 2:
        return True
    headings = np.unwrap(places[:, 2], period=360)
    angle = np.radians((headings[1:] + headings[:-1]) / 2)
    dx, dy = np.diff(places[:, 0]), np.diff(places[:, 1])
    per_frame = (
        (dx * np.cos(angle) + dy * np.sin(angle), motion.forward, _MOVED, _DRIFTED),
        (dx * np.sin(angle) - dy * np.cos(angle), motion.right, _MOVED, _DRIFTED),
        # Headings increase to the left.
        (-np.diff(headings), motion.turn, _TURNED, _STEADY),
    )
    return all(
        bool((values * way >= least * _TICS_PER_FRAME).all())
        if way
        else bool((np.abs(values) <= most * _TICS_PER_FRAME).all())
        for values, way, least, most in per_frame
    )


def _import_vizdoom() -> ModuleType:
    try:
        import vizdoom
    except ImportError as error:
        raise MissingPackageError(
            f"first-person clips need vizdoom, which cannot be imported here ({error}); run "
            "`pip install diffusion-apt[vizdoom]`"
        ) from error
    return vizdoom

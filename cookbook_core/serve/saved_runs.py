"""Runs and checkpoints as the REST interface lists them: folders, read as files.

CHECKPOINTS/SESSION-train-N/weights/NAME and .../sampler_weights/NAME hold what clients know as
tinker://SESSION:train:N/weights/NAME. A list survives the server, as nothing else does.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError
from cookbook_core.serve.replies import Refused

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(rf"tinker://([A-Za-z0-9]+:train:\d+)/(weights|sampler_weights)/({_PART})")
_RUN = re.compile(r"([A-Za-z0-9]+)-train-(\d+)")
_UNEMBEDDING = {"lm_head", "embed_out"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "out_proj"}
KINDS = {"weights": "training", "sampler_weights": "sampler"}


def folder_name(model_id: str) -> str:
    """The folder of a model's checkpoints: no colon, which Windows does not allow."""
    return model_id.replace(":", "-")


def wire_path(model_id: str, kind: str, name: str) -> str:
    """What clients call a checkpoint."""
    return f"tinker://{model_id}/{kind}/{name}"


class SavedRuns:
    """The checkpoints below one folder.

    Args:
        root: the folder.
        names: what clients call a base model, by its path here.
    """

    def __init__(self, root: Path, names: Mapping[str, str]) -> None:
        self.root, self._names = root, names

    def folder_of(self, path: str) -> Path:
        """The folder of a checkpoint.

        Raises:
            CheckpointError: not a path of this form.
            Refused: 404, no such checkpoint.
        """
        found = _PATH.fullmatch(path)
        if not found:
            rule = "tinker://SESSION:train:N/weights/NAME, or sampler_weights"
            what, fix = "not a checkpoint's path", "Pass a path that saving returned."
            raise CheckpointError("path", what, expected=rule, got=path, fix=fix)
        folder = self.root / folder_name(found[1]) / found[2] / found[3]
        if not (folder / "adapter_config.json").is_file():
            fix = "List what there is: GET /api/v1/checkpoints."
            raise Refused(404, "path", "no such checkpoint", got=path, fix=fix)
        return folder

    def info(self, folder: Path) -> dict[str, Any]:
        """What `weights_info` answers.

        Raises:
            CheckpointError: not a LoRA folder.
        """
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            targets, rank = set(config["target_modules"]), config["r"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(str(folder), "cannot be read", got=error) from error
        base = config.get("base_model_name_or_path") or ""
        tails = {target.split(".")[-1] for target in targets}
        attention = {t for t in tails if "attn" in t} | (tails & _ATTENTION)
        return {
            "base_model": self._names.get(base, base),
            "is_lora": True,
            "lora_rank": rank,
            "train_unembed": bool(tails & _UNEMBEDDING),
            "train_mlp": bool(tails - attention - _UNEMBEDDING),
            "train_attn": bool(attention),
        }

    def checkpoints(self, model_id: str | None = None) -> list[dict[str, Any]]:
        """The checkpoints of one model, or of all, the newest first."""
        rows = []
        for folder in self.root.glob("*/*/*/adapter_config.json"):
            run, kind, name = folder.parts[-4:-1]
            found = _RUN.fullmatch(run)
            if found and kind in KINDS and not name.startswith("."):
                own = f"{found[1]}:train:{found[2]}"
                if model_id in (None, own):
                    rows.append(self._row(own, kind, name, folder.parent))
        return sorted(rows, key=lambda row: row["_time"], reverse=True)

    def _row(self, model_id: str, kind: str, name: str, folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = {}
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            modified = (folder / "adapter_config.json").stat().st_mtime
            size = sum(file.stat().st_size for file in folder.iterdir())
        except (OSError, ValueError):  # deleted meanwhile, or written by another program
            modified, size = 0.0, 0
        return {
            "checkpoint_id": f"{kind}/{name}",
            "checkpoint_type": KINDS[kind],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified)),
            "tinker_path": wire_path(model_id, kind, name),
            "size_bytes": size,
            "public": False,
            "user_metadata": state.get("user_metadata"),
            "expires_at": None,
            "_time": modified, "_run": model_id, "_folder": folder, "_step": state.get("step", 0),
        }  # fmt: skip

    def latest(self, model_id: str) -> dict[str, Any] | None:
        """A model's newest checkpoint to resume from."""
        return next((r for r in self.checkpoints(model_id) if r["checkpoint_type"] == "training"),
                    None)  # fmt: skip

    def runs(self) -> dict[str, dict[str, Any]]:
        """Training runs that have checkpoints, by id, the newest first."""
        runs: dict[str, dict[str, Any]] = {}
        for row in self.checkpoints():
            run = runs.get(row["_run"])
            if run is None:
                try:
                    info = self.info(row["_folder"])
                except CheckpointError:
                    continue
                run = runs[row["_run"]] = run_row(
                    row["_run"], info["base_model"], info["lora_rank"], row["_time"],
                    row["user_metadata"],
                )  # fmt: skip
            last = "last_checkpoint" if row["checkpoint_type"] == "training" else (
                "last_sampler_checkpoint")  # fmt: skip
            run[last] = run[last] or public(row)
        return runs

    def delete(self, path: str) -> None:
        """Delete a checkpoint.

        Raises:
            Refused: as for `folder_of`.
        """
        shutil.rmtree(self.folder_of(path))

    def archive(self, path: str) -> bytes:
        """A checkpoint as an uncompressed tar file.

        Raises:
            Refused: as for `folder_of`.
        """
        folder, buffer = self.folder_of(path), io.BytesIO()
        with tarfile.TarFile(fileobj=buffer, mode="w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name)
        return buffer.getvalue()


def run_row(
    model_id: str, base: str, rank: int | None, used_at: float, metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    """A training run as the REST interface lists it."""
    return {
        "training_run_id": model_id,
        "base_model": base,
        "model_owner": "local",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": rank,
        "last_request_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(used_at)),
        "last_checkpoint": None,
        "last_sampler_checkpoint": None,
        "user_metadata": None if metadata is None else dict(metadata),
    }


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is for this server alone."""
    return {key: value for key, value in row.items() if not key.startswith("_")}

"""Results kept by what they depend on, so that long work goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlin.experiments.run_folder import write_json


class Cache:
    """Results by a hash of what they depend on, a JSON file each, written whole or not at all.

    Attributes:
        folder: Where they lie.
        seconds: What computing the results asked for has taken, whenever that was.
        saved: Of that, what was not spent now.
        read: Paths of those files.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder, which may be there."""
        self.folder, self.seconds, self.saved = folder, 0.0, 0.0
        self.read: set[Path] = set()
        self._depth = 0
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Returns the result of `key`, computed if it is not there.

        Args:
            key: All that the result depends on, as JSON can hold it.
            compute: Gives the result, likewise; NaN and infinities may be among it. It may ask for others: they are
                kept by themselves, and the time they took is part of this one's.
        """
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{name}.json"
        kept = path.exists()
        if not kept:
            begin, saved = time.monotonic(), self.saved
            self._depth += 1
            try:
                result = compute()
            finally:
                self._depth -= 1
            seconds = time.monotonic() - begin + self.saved - saved
            write_json(path, {"key": key, "seconds": seconds, "result": result})
        found = _numbers(json.loads(path.read_text()))
        if path not in self.read:
            self.read.add(path)
            self.saved += found["seconds"] if kept else 0.0
            self.seconds += 0.0 if self._depth else found["seconds"]
        return found["result"]


_WORDS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def _numbers(content: Any) -> Any:
    """JSON has no NaN and no infinity: `write_json` makes words of them."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_numbers(value) for value in content]
    return _WORDS.get(content, content) if isinstance(content, str) else content

"""Checks of a service whose model reads images."""

from __future__ import annotations

import dataclasses
import io

from cookbook_core.backend.gradient_probe import SAME_PATH, difference
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import Subject, logprobs
from cookbook_core.images import ImageReader
from cookbook_core.tinker import Datum, EncodedTextChunk, ImageChunk, ModelInput

import numpy as np

LEAST = 1e-3
"""Nats by which another image must move the logprobs of the text after it."""


def images_read(s: Subject) -> Outcome:
    """The text after an image is scored with it: equal for the same one, not for another."""
    image, other = (_image(s.images(), turned) for turned in (0, 90))
    one, again, changed = (
        [scores[-3:] for scores in logprobs(s.client(), [_datum(s, x)])]
        for x in (image, image, other)
    )
    same, moved = difference(one, again), difference(one, changed)
    figure = f"another image moves logprobs by {moved:.2g} nats, the same one by {same:.2g}"
    return passes(same <= SAME_PATH and moved > max(LEAST, 2 * same), figure)


def miscounted(s: Subject) -> list[Datum]:
    """An image that states one position too many."""
    image = _image(s.images(), 0)
    return [_datum(s, dataclasses.replace(image, expected_tokens=image.length + 1))]


def _datum(s: Subject, image: ImageChunk) -> Datum:
    ids = s.ids(6, seed=7)
    value = ModelInput([EncodedTextChunk(ids[:3]), image, EncodedTextChunk(ids[3:])])
    weights = np.zeros(value.length)
    weights[-3:] = 1.0
    return Datum(value, {"target_tokens": [*value.ids()[1:], ids[0]], "weights": weights})


def _image(reader: ImageReader, turned: int) -> ImageChunk:
    """A ramp from black to white, turned by this many degrees."""
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").rotate(turned).resize((64, 64)).convert("RGB").save(file, "PNG")
    return reader.chunk(file.getvalue())

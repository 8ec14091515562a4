"""What is done to a page after nbdev: settings.ini names it under `procs`."""

import re

LINK = re.compile(r"\[`([^`\]]+)`\]\([^)\s]*\)")
SIGNATURE = re.compile(r"```python\n.*?\n```", re.DOTALL)
# nbdev sets the first line of a docstring in italics, also where the sentence goes on below it
SPLIT_SENTENCE = re.compile(r"(```\n\n\*[^*\n]+)\*\n([^*\n]+(?:\n[^*\n]+)*)")


def plain_signatures(cell):
    """Take the links out of signatures, where they would be read as they are written, and set the
    whole first sentence of a docstring in italics."""
    for output in cell.get("outputs", []):
        lines = output.get("data", {}).get("text/markdown")
        if not lines or "```python\n" not in (markdown := "".join(lines)):
            continue
        markdown = SIGNATURE.sub(lambda found: LINK.sub(r"`\1`", found[0]), markdown)
        markdown = SPLIT_SENTENCE.sub(r"\1 \2*", markdown, count=1)
        output["data"]["text/markdown"] = markdown.splitlines(keepends=True)

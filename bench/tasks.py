"""Fixed prompts for bench/speculation.py: tasks whose answers copy from the prompt, and an ordinary set.

The texts come with Python (``pydoc_data.topics``) and with this repository (LICENSE).
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"


def passage(source: str, start: str) -> str:
    """The paragraph of a topic (or of "license") that begins with ``start``, on one line. Raises LookupError."""
    text = LICENSE.read_text() if source == "license" else topics[source]
    for paragraph in text.replace("\n\n", "\0").split("\0"):
        line = " ".join(paragraph.split())
        if line.startswith(start):
            return line
    raise LookupError(f"{source} has no paragraph that begins with {start!r}: another version of the text?")


REPLACE = "Rewrite the following text with every '{0}' replaced by '{1}'. Change nothing else.\n\n{text}"
COPY = "Copy the following text word for word.\n\n{text}"
FIX = "Correct the spelling mistakes in the following text and write out the corrected text.\n\n{text}"
SPLIT = "Write out the following text again with each sentence on a line of its own.\n\n{text}"
QUOTE = "Summarize the following text by quoting its most important sentences word for word.\n\n{text}"
EXTRACT = "Extract every sentence of the following text that mentions {0}, word for word.\n\n{text}"
UPPER = "Rewrite the following text, adding the title '{0}' at the top and keeping every sentence.\n\n{text}"


def misspelt(text: str) -> str:
    """``text`` with the letters of common words swapped."""
    for right, wrong in ((" the ", " teh "), (" and ", " adn "), (" with ", " wiht "), (" which ", " whcih ")):
        text = text.replace(right, wrong)
    return text


def copying() -> list[str]:
    """Prompts whose answers copy: edits, extraction, summaries with quotes."""
    work = passage("license", '"Derivative Works" shall mean')
    source = passage("license", '"Contribution" shall mean')
    grant = passage("license", "2. Grant of Copyright License.")
    patent = passage("license", "3. Grant of Patent License.")
    marks = passage("license", "6. Trademarks.")
    warranty = passage("license", "7. Disclaimer of Warranty.")
    liability = passage("license", "8. Limitation of Liability.")
    bound = passage("naming", "If a name is bound in a block")
    scope = passage("naming", "A *scope* defines the visibility")
    block = passage("execmodel", "A Python program is constructed")
    binding = passage("naming", "If a name binding operation")
    manager = passage("context-managers", "A *context manager* is an object")
    error = passage("exceptions", "The Python interpreter raises")
    caught = passage("exceptions", "Exceptions are identified by")
    clause = passage("raise", 'The "from" clause is used')
    debugger = passage("debugger", 'The module "pdb" defines')
    dotpdb = passage("debugger", 'If a file ".pdbrc"')
    aliases = passage("debugger", "Aliases may be nested")
    return [
        REPLACE.format("Work", "Program", text=work),
        REPLACE.format("Licensor", "Owner", text=marks),
        REPLACE.format("block", "section", text=bound),
        REPLACE.format("name", "label", text=scope),
        REPLACE.format("exception", "fault", text=error),
        REPLACE.format("file", "script", text=dotpdb),
        REPLACE.format("Contributor", "Author", text=grant),
        REPLACE.format("block", "unit", text=block),
        COPY.format(text=source),
        COPY.format(text=binding),
        COPY.format(text=clause),
        FIX.format(text=misspelt(warranty)),
        FIX.format(text=misspelt(manager)),
        FIX.format(text=misspelt(caught)),
        SPLIT.format(text=debugger),
        SPLIT.format(text=binding),
        SPLIT.format(text=liability),
        QUOTE.format(text=block),
        QUOTE.format(text=patent),
        QUOTE.format(text=work),
        EXTRACT.format("a block", text=bound),
        EXTRACT.format("the Licensor", text=source),
        EXTRACT.format("a context manager", text=manager),
        EXTRACT.format("aliases", text=aliases),
        UPPER.format("Limitation of Liability", text=liability),
        UPPER.format("Scopes", text=scope),
    ]


def ordinary() -> list[str]:
    """Stories and questions: answers that copy nothing."""
    return [
        "Tell me a story about a lighthouse keeper and a storm.",
        "What is the capital of France, and what is it known for?",
        "Explain how a bicycle stays upright.",
        "Write a short poem about autumn.",
        "Why is the sky blue?",
        "Give me five ideas for a birthday party.",
        "Write a letter to a friend about moving to a new town.",
        "How do vaccines work?",
        "Tell me a story about a dog that learns to read.",
        "What are the advantages of learning a second language?",
        "Describe a day at the beach.",
        "How do I bake bread?",
    ]

"""The 14 tasks of the paper's evaluation, as lm-eval tasks: `tasks/*.yaml`.

Each task exists twice. `pat14_NAME` is the paper's protocol (greedy, 5 new tokens, the first capital letter that is one
of the labels is the answer), `pat14_NAME_ll` ranks the options by their likelihood, since a small model does not answer
with letters.

questions.py  a data set's own fields -> a question      local_items.py  written-out prompts -> the same questions
datasets.py   where they come from                       scoring.py      an answer -> right or wrong
"""

# The tasks stand in the paper's order.
TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "copa",
    "hellaswag",
    "mmlu",
    "multirc",
    "openbookqa",
    "piqa",
    "rte",
    "siqa",
    "wic",
    "winogrande",
    "wsc",
)
PREFIX = "pat14"
GROUPS = (PREFIX, f"{PREFIX}_ll")


def members(group: str) -> list[str]:
    """Task names of one of the two groups."""
    suffix = group.removeprefix(PREFIX)
    return [f"{PREFIX}_{task}{suffix}" for task in TASKS]

"""The shapes that a model can have: sizes, what they cost, which are legal, and which reach a goal. Pure arithmetic."""

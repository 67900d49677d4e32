"""From timestamps and configs to figures and verdicts: pure mathematics, no engine, no files."""

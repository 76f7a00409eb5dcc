"""The page, its pictures and maps: they draw verdicts, they make none."""

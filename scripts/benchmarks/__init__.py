"""The project's benchmark: ``scripts/bench`` runs it, ``PERFORMANCE.md`` explains what came out."""

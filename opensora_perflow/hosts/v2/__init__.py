"""Everything that knows Open-Sora 2.0."""

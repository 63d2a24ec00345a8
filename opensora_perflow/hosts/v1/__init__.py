"""Everything that knows Open-Sora 1.0 to 1.3."""

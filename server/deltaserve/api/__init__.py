"""HTTP only: parse, authorise, hand over, format. Knows no torch, no files, no slots."""

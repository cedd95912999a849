"""Tokens in, tokens out. Knows slots and digests; knows neither HTTP nor the names that tenants give."""

"""Who there is and what they own: accounts, keys, models and their versions, the audit log. One SQLite file."""

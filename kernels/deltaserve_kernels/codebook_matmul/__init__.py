"""K4: vectors of a shared table, one projection of the activations for all tenants."""

"""A K/V split that depends on a row's own length alone, inside SGLang's backends."""

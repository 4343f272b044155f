"""When two mathematical answers mean the same: notation, grammar, comparison by value."""

"""One module per op family: the reference, its spec, its public function."""

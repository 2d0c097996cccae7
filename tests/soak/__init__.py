"""Campaigns that look for what fails under hostile files, bad input, kills and bad luck; tests/soak.sh runs them."""

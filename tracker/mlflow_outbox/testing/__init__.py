"""Doubles for the tests of programs that log through an outbox."""

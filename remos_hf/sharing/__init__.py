"""Telling others: the files beside a student, its model card, and the Hub."""

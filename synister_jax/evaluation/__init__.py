# SPDX-License-Identifier: Apache-2.0
"""Measures how accurate predictions are, and calls the transmitter of a group."""

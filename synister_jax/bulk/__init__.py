# SPDX-License-Identifier: Apache-2.0
"""Prediction of any size: planned, executed in units, merged."""

# SPDX-License-Identifier: Apache-2.0
"""The electron-microscopy volume: how it is opened, described, and read in crops."""

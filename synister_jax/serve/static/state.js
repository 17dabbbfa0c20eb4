// SPDX-License-Identifier: Apache-2.0
// What the modules of the page share.

export const state = {
  session: null,
  models: [],
  shown: null, // name of the view
  left: [], // what to stop when it is left
  parting: "", // what is said in the next view
};

/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

// Command print prints the figures of a run of the tests, from the file that
// GUEST_PULL_FIGURES names.
package main

import (
	"fmt"
	"os"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
)

func main() {
	if err := figures.Print(os.Stdout, os.Getenv(figures.Env)); err != nil {
		fmt.Fprintln(os.Stderr, "figures:", err)
		os.Exit(1)
	}
}

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

// Command containerd is containerd with the guest-pull snapshotter built in: a
// drop-in replacement that takes the same configuration, commands and signals.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	// The plugins of stock containerd, and ours.
	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"

	_ "github.com/guest-pull/guest-pull-snapshotter/plugin"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd:", err)
		os.Exit(1)
	}
}

func run() error {
	all := func(*plugin.Registration) bool { return false }
	if err := addUnpackConfig(registry.Graph(all)); err != nil {
		return err
	}
	return runApp(context.Background())
}

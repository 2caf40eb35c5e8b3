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

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/version"
	"github.com/urfave/cli/v3"
)

// Set at link time.
var (
	// guestPullVersion is the version of this project.
	guestPullVersion = "0.0.0+unknown"
	// patches names the patches to containerd that are built in, separated by commas.
	patches = ""
)

var guestPullCommand = &cli.Command{
	Name:  "guest-pull",
	Usage: "Configure and inspect the guest-pull snapshotter",
	Commands: []*cli.Command{{
		Name:  "version",
		Usage: "Print the versions, and the patches to containerd that are built in",
		Action: func(_ context.Context, cmd *cli.Command) error {
			w := cmd.Root().Writer
			fmt.Fprintln(w, "guest-pull:", guestPullVersion)
			fmt.Fprintln(w, "containerd:", version.Version, version.Revision)
			fmt.Fprintln(w, "go:", version.GoVersion)
			if patches == "" {
				fmt.Fprintln(w, "patches: none")
				return nil
			}
			fmt.Fprintln(w, "patches:")
			for p := range strings.SplitSeq(patches, ",") {
				fmt.Fprintln(w, "  "+p)
			}
			return nil
		},
	}},
}

//go:build containerd_2_3

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
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd/command"
	cliv2 "github.com/urfave/cli/v2"
	"github.com/urfave/cli/v3"
)

// runApp runs containerd's commands, and ours. Those are made with urfave/cli v3,
// containerd's with v2 until 2.3: a command of v2 hands its arguments on, below a
// root that has what ours read of containerd's global flags.
func runApp(context.Context) error {
	app := command.App()
	app.Commands = append(app.Commands, &cliv2.Command{
		Name:            guestPullCommand.Name,
		Usage:           guestPullCommand.Usage,
		SkipFlagParsing: true,
		Action: func(c *cliv2.Context) error {
			root := &cli.Command{
				Name:     app.Name,
				Writer:   app.Writer,
				Commands: []*cli.Command{guestPullCommand},
			}
			args := []string{app.Name}
			for _, name := range []string{"config", "address", "root", "state"} {
				root.Flags = append(root.Flags, &cli.StringFlag{Name: name, Value: c.String(name)})
				if c.IsSet(name) {
					args = append(args, "--"+name, c.String(name))
				}
			}
			args = append(args, guestPullCommand.Name)
			return root.Run(c.Context, append(args, c.Args().Slice()...))
		},
	})
	return app.Run(os.Args)
}

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
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/urfave/cli/v3"

	"github.com/guest-pull/guest-pull-snapshotter/builder/status"
)

var statusCommand = &cli.Command{
	Name:  "status",
	Usage: "Show the images, layers and snapshots of the guest-pull snapshotter",
	Description: `Asks the running containerd (--address, or the address in the configuration) for
the images that are left to guests, what of them is kept off the host, and the
snapshots of containers with those that nothing needs any more.`,
	Flags: []cli.Flag{jsonFlag},
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := quiet(); err != nil {
			return err
		}
		address := cmd.String("address")
		if address == "" {
			config, err := effectiveConfig(ctx, cmd)
			if err != nil {
				return err
			}
			address = config.Plugins.GRPC.Address
		}
		client, err := connect(address)
		if err != nil {
			return err
		}
		defer client.Close() //nolint:errcheck // it only read
		s, err := status.Collect(ctx, client)
		if err != nil {
			return fmt.Errorf("containerd at %s: %w", address, err)
		}
		if cmd.Bool("json") {
			return s.WriteJSON(cmd.Root().Writer)
		}
		return s.WriteTable(cmd.Root().Writer)
	},
}

// connect returns a client of the containerd that runs.
func connect(address string) (*containerd.Client, error) {
	// The client waits for a socket to appear.
	if _, err := os.Stat(address); err != nil {
		return nil, fmt.Errorf("containerd does not run, or serves another address (--address): %w", err)
	}
	client, err := containerd.New(address, containerd.WithTimeout(askTimeout))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	return client, nil
}

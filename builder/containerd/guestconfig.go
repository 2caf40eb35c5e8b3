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
	"cmp"
	"context"
	"fmt"
	"os"

	"github.com/urfave/cli/v3"

	"github.com/guest-pull/guest-pull-snapshotter/builder/guestconfig"
)

func init() {
	guestPullCommand.Commands = append(guestPullCommand.Commands, guestConfigCommand)
}

var guestConfigCommand = &cli.Command{
	Name:  "guest-config",
	Usage: "Print what a guest has to be told of this node's registries",
	Description: `Reads the mirrors, authorities, plain-HTTP registries and proxies of containerd
(config_path with its hosts.toml, mirrors of version 2, the environment of the
running containerd) and prints them as a guest of Confidential Containers reads
them:

  cdh         the section [image] of cdh.toml, the configuration of the guest's
              Confidential Data Hub
  initdata    a whole init data with that cdh.toml
  annotation  the same as the value of a pod's annotation
              ` + guestconfig.Annotation + `

What a guest cannot be told is said in comments and on standard error. No
credential is printed. With --compare, a cdh.toml, init data or value of the
annotation is compared with it: differences are printed, and the exit status is 1
if a pull of the guest would go elsewhere.`,
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "format", Value: string(guestconfig.CDH), Usage: "`FORMAT`: cdh, initdata or annotation"},
		&cli.StringFlag{Name: "registry", Usage: "Only for the registry `HOST`, with its port if it has one"},
		&cli.StringFlag{Name: "compare", Usage: "Compare `FILE` with what would be printed"},
		&cli.StringFlag{Name: "kbs-url", Usage: "The key broker's `URL`, for init data"},
		&cli.StringFlag{Name: "credentials-uri", Usage: "Where the guest finds credentials for registries (`kbs:///...`)"},
	},
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := quiet(); err != nil {
			return err
		}
		conf, err := effectiveConfig(ctx, cmd)
		if err != nil {
			return err
		}
		daemon, host := askDaemon(ctx, daemonAddress(cmd, conf))
		registry := cmd.String("registry")
		result, err := guestconfig.Make(ctx, guestconfig.Node{Registry: conf.Plugins.Images.Registry, Env: host.Env}, registry)
		if err != nil {
			return err
		}
		result.Image.CredentialsURI = cmd.String("credentials-uri")
		stderr := cmd.Root().ErrWriter
		if stderr == nil {
			stderr = os.Stderr
		}
		if err := cmp.Or(daemon.Err, daemon.EnvErr); err != nil {
			fmt.Fprintf(stderr, "note: the proxy: containerd could not be asked for its environment (%v); this command's own is used\n", err)
		}
		if name := cmd.String("compare"); name != "" {
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			guest, err := guestconfig.Parse(text)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			elsewhere := false
			for _, d := range result.Compare(guest, registry) {
				fmt.Fprintln(cmd.Root().Writer, d.What)
				elsewhere = elsewhere || d.Elsewhere
			}
			if elsewhere {
				return cli.Exit("", 1)
			}
			return nil
		}
		format := guestconfig.Format(cmd.String("format"))
		text, err := result.Encode(format, cmd.String("kbs-url"))
		if err != nil {
			return err
		}
		for _, n := range result.Notes {
			fmt.Fprintln(stderr, "note:", n)
		}
		if result.Credentials && result.Image.CredentialsURI == "" {
			fmt.Fprintf(stderr, "note: the node has credentials, which are not printed: --credentials-uri %s says where the guest finds its own\n", guestconfig.Placeholder)
		}
		if format != guestconfig.CDH && cmd.String("kbs-url") == "" {
			fmt.Fprintln(stderr, "note: without --kbs-url a guest with this init data knows no key broker, whatever its kernel_params say")
		}
		_, err = cmd.Root().Writer.Write(text)
		return err
	},
}

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
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	"github.com/urfave/cli/v3"

	"github.com/guest-pull/guest-pull-snapshotter/builder/check"
	"github.com/guest-pull/guest-pull-snapshotter/builder/status"
	guestpull "github.com/guest-pull/guest-pull-snapshotter/plugin"
)

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "Print JSON instead of a table"}

func init() {
	guestPullCommand.Commands = append(guestPullCommand.Commands, checkCommand, statusCommand)
}

var checkCommand = &cli.Command{
	Name:  "check",
	Usage: "Find what on this node keeps guest-pulled pods from running",
	Description: `Reads the configuration that containerd would start with (--config, its imports,
plugin defaults), the host, and what a running containerd says of itself, and
prints what is wrong, why it matters, and what to do. It changes nothing.

The exit status is 1 when something was found that breaks a pod (an "error"),
and 0 otherwise.`,
	Flags: []cli.Flag{jsonFlag},
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := quiet(); err != nil {
			return err
		}
		report := check.Run(ctx, checkInput(ctx, cmd))
		write := report.WriteTable
		if cmd.Bool("json") {
			write = report.WriteJSON
		}
		if err := write(cmd.Root().Writer); err != nil {
			return err
		}
		if !report.OK() {
			return cli.Exit("", 1)
		}
		return nil
	},
}

// criID is the ID of the plugin that serves CRI.
const criID = "cri"

// grpcSection is the section of the plugin that serves containerd's socket.
const grpcSection = "io.containerd.server.v1.grpc"

// quiet keeps containerd's loading of a configuration from logging: what it would
// say is among the findings.
func quiet() error { return log.SetLevel("fatal") }

func checkInput(ctx context.Context, cmd *cli.Command) check.Input {
	in := check.Input{}
	if patches != "" {
		in.Patches = strings.Split(patches, ",")
	}
	in.Config, in.ConfigErr = effectiveConfig(ctx, cmd)
	in.Daemon, in.Host = askDaemon(ctx, daemonAddress(cmd, in.Config))
	return in
}

// daemonAddress is where containerd serves its API, by the command line or by the
// configuration, which may be nil.
func daemonAddress(cmd *cli.Command, config *check.Config) string {
	if address := cmd.String("address"); address != "" || config == nil {
		return address
	}
	return config.Plugins.GRPC.Address
}

// effectiveConfig loads the configuration as containerd does when it starts
// (cmd/containerd/command/main.go), and as `containerd config dump` does. Unlike
// that, it registers no proxy plugins, which ends in a panic for one of this
// snapshotter's name.
func effectiveConfig(ctx context.Context, cmd *cli.Command) (*check.Config, error) {
	return loadEffective(ctx, cmd, cmd.String("config"))
}

// loadEffective does so with another main file.
func loadEffective(ctx context.Context, cmd *cli.Command, path string) (*check.Config, error) {
	config := &srvconfig.Config{
		Version: version.ConfigVersion,
		Root:    defaults.DefaultRootDir,
		State:   defaults.DefaultStateDir,
		Plugins: map[string]any{
			grpcSection: map[string]any{"address": defaults.DefaultAddress},
		},
	}
	graph := registry.Graph(func(*plugin.Registration) bool { return false })
	if _, err := os.Stat(path); !os.IsNotExist(err) || cmd.IsSet("config") {
		if err := loadConfig(ctx, path, graph, config); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	if root := cmd.String("root"); root != "" {
		config.Root = root
	}

	sections := map[string]any{}
	var unknown []string
	for _, p := range graph {
		if p.Config == nil || !looksAt(p.URI()) {
			continue
		}
		defaults, err := copyOf(p.Config)
		if err != nil {
			return nil, fmt.Errorf("the defaults of [plugins.'%s']: %w", p.URI(), err)
		}
		keys, err := unknownKeys(config.Plugins[p.URI()], defaults)
		if err != nil {
			return nil, fmt.Errorf("[plugins.'%s']: %w", p.URI(), err)
		}
		for _, k := range keys {
			unknown = append(unknown, fmt.Sprintf("[plugins.'%s']: %s", p.URI(), k))
		}
		if sections[p.URI()], err = config.Decode(ctx, p.URI(), defaults); err != nil {
			return nil, fmt.Errorf("[plugins.'%s']: %w", p.URI(), err)
		}
	}
	if sections[grpcSection] == nil {
		sections[grpcSection] = config.Plugins[grpcSection]
	}
	for uri := range config.Plugins {
		known := slices.ContainsFunc(graph, func(r plugin.Registration) bool { return r.URI() == uri })
		if !known && strings.Contains(strings.ReplaceAll(uri, "_", "-"), guestpull.ID) {
			unknown = append(unknown, fmt.Sprintf("[plugins.'%s'] (want [plugins.'%s'])", uri, check.PluginURI))
		}
	}
	text, err := toml.Marshal(map[string]any{
		"root":             config.Root,
		"disabled_plugins": config.DisabledPlugins,
		"proxy_plugins":    config.ProxyPlugins,
		"plugins":          sections,
	})
	if err != nil {
		return nil, err
	}
	c, err := check.ParseConfig(text)
	if err != nil {
		return nil, err
	}
	slices.Sort(unknown)
	c.Path, c.UnknownKeys = path, unknown
	return c, nil
}

// looksAt says whether the checks look at a plugin's section.
func looksAt(uri string) bool {
	return slices.Contains([]string{
		check.PluginURI,
		string(plugins.CRIServicePlugin) + ".runtime",
		string(plugins.CRIServicePlugin) + ".images",
		string(plugins.TransferPlugin) + ".local",
		grpcSection,
	}, uri)
}

// copyOf copies a plugin's defaults. To decode into them would change them for the
// next configuration that is loaded.
func copyOf(config any) (any, error) {
	b, err := toml.Marshal(config)
	if err != nil {
		return nil, err
	}
	c := reflect.New(reflect.TypeOf(config).Elem()).Interface()
	return c, toml.Unmarshal(b, c)
}

// unknownKeys returns the keys of a section that its plugin does not have.
// containerd logs these, and goes on without them.
func unknownKeys(section, config any) ([]string, error) {
	if section == nil {
		return nil, nil
	}
	b, err := toml.Marshal(section)
	if err != nil {
		return nil, err
	}
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(config)
	var strict *toml.StrictMissingError
	if !errors.As(err, &strict) {
		return nil, err
	}
	var keys []string
	for _, e := range strict.Errors {
		keys = append(keys, strings.Join(e.Key(), "."))
	}
	return keys, nil
}

const askTimeout = 10 * time.Second

// askDaemon asks the containerd that runs, and finds out how its process sees the
// host. Without one, this process's environment stands in for it.
func askDaemon(ctx context.Context, address string) (check.Daemon, check.Host) {
	d := check.Daemon{Address: address}
	h := check.Host{
		Path:       filepath.SplitList(os.Getenv("PATH")),
		PathSource: "this command's own; containerd could not be asked for its",
		Env:        environment(os.Environ()),
	}
	// The client waits for a socket to appear.
	if _, d.Err = os.Stat(address); d.Err != nil {
		return d, h
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := containerd.New(address, containerd.WithTimeout(askTimeout))
	if err != nil {
		d.Err = err
		return d, h
	}
	defer client.Close() //nolint:errcheck // it only read
	all, err := client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin)+",id=="+guestpull.ID, "type=="+string(plugins.GRPCPlugin)+",id=="+criID)
	if err != nil {
		d.Err = err
		return d, h
	}
	for _, p := range all.GetPlugins() {
		switch p.ID {
		case guestpull.ID:
			d.HasPlugin = true
			d.PluginErr = p.GetInitErr().GetMessage()
		case criID:
			d.HasCRI = true
			d.CRIErr = p.GetInitErr().GetMessage()
		}
	}
	server, err := client.IntrospectionService().Server(ctx)
	if err != nil {
		d.Err = err
		return d, h
	}
	// Without the snapshotter there are none, which is a finding of its own.
	if s, err := status.Collect(ctx, client); err == nil {
		seen := map[string]bool{}
		for _, i := range s.Images {
			if seen[i.Digest] || strings.HasPrefix(i.Name, "sha256:") { // another name
				continue
			}
			seen[i.Digest] = true
			d.Images = append(d.Images, check.Image{Name: i.Name, Bytes: i.Bytes})
		}
	}
	d.Pid = server.GetPid()
	proc := fmt.Sprintf("/proc/%d", d.Pid)
	if d.Binary, err = os.Readlink(proc + "/exe"); err != nil {
		d.Binary = "process " + filepath.Base(proc)
	}
	d.Binary = strings.TrimSuffix(d.Binary, " (deleted)") // it was replaced since
	b, err := os.ReadFile(proc + "/environ")
	if d.EnvErr = err; err == nil {
		h.Env = environment(strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"))
		h.Path = filepath.SplitList(h.Env["PATH"])
		h.PathSource = "of the running containerd"
	}
	return d, h
}

func environment(list []string) map[string]string {
	env := map[string]string{}
	for _, e := range list {
		k, v, _ := strings.Cut(e, "=")
		env[k] = v
	}
	return env
}

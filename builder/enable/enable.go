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

// Package enable turns guest pull on and off for the runtime handlers of a node.
//
// What it writes is a drop-in of its own (DropIn) in the directory conf.d beside
// containerd's configuration, with one table for each handler. No other file is
// changed, except that config.toml is made where there is none, and that a line of
// it is changed where the caller asks for that ([Node.Import]).
//
// Nothing is written before the result was loaded as containerd would load it:
// [Node.Enable] and [Node.Disable] return a [Change] that has been tried in a
// directory of its own; [Change.Apply] writes it. [Node.Lock] keeps others from doing
// the same in between.
package enable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/builder/check"
)

const (
	// DropIn is the name of the file in conf.d.
	DropIn = "60-guest-pull-handlers.toml"
	// Late is the name of a second file beside it. It is there when another file,
	// which is imported after conf.d, would win over the drop-in: containerd loads
	// the imports of an imported file after those of the main file.
	Late = "60-guest-pull-handlers.late"

	runtimeURI = "io.containerd.cri.v1.runtime"
	imagesURI  = "io.containerd.cri.v1.images"
	runcType   = "io.containerd.runc.v2"

	header = `# Written by "containerd guest-pull enable": the runtime handlers whose images are
# pulled in the guest. "containerd guest-pull disable" takes it back. Other settings
# of these handlers belong into another file.
`
	// newConfig is what config.toml is made with, as the packages make it.
	newConfig = `version = 3

imports = [%q]
`
)

type table = map[string]any

// Node is the configuration of a node.
type Node struct {
	// Config is the path of containerd's main configuration file, which need not
	// exist.
	Config string
	// Load returns the effective configuration that containerd would start with
	// if its main file were the one at path.
	Load func(path string) (*check.Config, error)
	// Import allows to change the line of config.toml that imports files.
	Import bool
}

// Handler is a runtime handler to be made: one that the node does not have.
type Handler struct {
	// RuntimeType is the type of its runtime, such as io.containerd.kata.v2.
	RuntimeType string
	// KataConfig is the path of Kata's configuration; "" leaves it to the shim.
	KataConfig string
}

// File is a file that changes. Old and New are nil where it does not exist.
type File struct {
	Path     string
	Old, New []byte
}

// Change is what is to be written. It has been loaded.
type Change struct {
	// Files are those that change; none says that all is as it should be.
	Files []File
	// Before and After are the effective configurations.
	Before, After *check.Config
	// Handlers are those that are turned on or off, sorted.
	Handlers []string
	// Already are those that were asked for and are on without this drop-in, and
	// so are left as they are.
	Already []string
}

// Lock waits until no other process changes the node's configuration with this
// package, and keeps others from it until the returned function is called. What was
// returned by Enable and Disable is of use only as long.
func (n Node) Lock() (unlock func(), err error) {
	dir := filepath.Dir(n.Config)
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			break
		}
		dir = filepath.Dir(dir)
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(d.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), d.Close())
	}
	return func() { d.Close() }, nil //nolint:errcheck // nothing was written to it
}

func (n Node) confD() string { return filepath.Join(filepath.Dir(n.Config), "conf.d") }

// handlerName is what Kubernetes lets a RuntimeClass name as its handler
// (RFC 1123 label).
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Enable makes the change that turns guest pull on for these handlers. A handler
// that the node does not have is made if how has a runtime type.
//
// The error is errdefs.ErrInvalidArgument for bad input, errdefs.ErrNotFound for a
// handler that the node does not have, and errdefs.ErrFailedPrecondition for a
// configuration that cannot be loaded, does not import the drop-in, or would not
// have the effect.
func (n Node) Enable(handlers []string, how Handler) (Change, error) {
	if len(handlers) == 0 {
		return Change{}, fmt.Errorf("no handler is named: %w", errdefs.ErrInvalidArgument)
	}
	ours, err := n.read()
	if err != nil {
		return Change{}, err
	}
	before, err := n.before()
	if err != nil {
		return Change{}, err
	}
	base, err := n.try(map[string][]byte{n.dropIn(): nil, n.late(): nil})
	if err != nil {
		return Change{}, err
	}
	c := Change{Before: before}
	for _, name := range handlers {
		if slices.Contains(c.Handlers, name) {
			continue
		}
		have, exists := base.Plugins.Runtime.Containerd.Runtimes[name]
		entry := table{"snapshotter": check.Snapshotter}
		switch {
		case exists && have.Type == runcType:
			return Change{}, fmt.Errorf("handler %q is runc, and runc has no guest that could pull: %w", name, errdefs.ErrInvalidArgument)
		case exists && how.RuntimeType != "" && how.RuntimeType != have.Type:
			return Change{}, fmt.Errorf("handler %q exists and has runtime_type %q, not %q; leave the type out: %w",
				name, have.Type, how.RuntimeType, errdefs.ErrInvalidArgument)
		case exists && how.KataConfig != "" && how.KataConfig != have.Options["ConfigPath"]:
			return Change{}, fmt.Errorf("handler %q exists, and its configuration of Kata is set where the handler is (%s), not by this command: %w",
				name, n.where(name), errdefs.ErrInvalidArgument)
		case exists && base.EffectiveSnapshotter(have) == check.Snapshotter && platform(base, name) == nil:
			c.Already = append(c.Already, name)
			continue
		case exists:
		case ours[name] != nil && how == (Handler{}):
			// One that an earlier call made.
			entry = ours[name].handler
		case how.RuntimeType == "":
			return Change{}, fmt.Errorf("no handler %q: this node has %s; to make it, name the type of its runtime: %w", name,
				strings.Join(slices.Sorted(maps.Keys(base.Plugins.Runtime.Containerd.Runtimes)), ", "), errdefs.ErrNotFound)
		case !handlerName.MatchString(name):
			return Change{}, fmt.Errorf("%q cannot be the name of a handler that a RuntimeClass names: want lower case letters, digits and -: %w",
				name, errdefs.ErrInvalidArgument)
		default:
			entry["runtime_type"] = how.RuntimeType
			// What Kata wants, as kata-deploy sets it: its annotations, init
			// data among them, reach the shim only if they are let through.
			entry["pod_annotations"] = []string{"io.katacontainers.*"}
			entry["privileged_without_host_devices"] = true
			if how.KataConfig != "" {
				entry["options"] = table{"ConfigPath": how.KataConfig}
			}
		}
		ours[name] = &settings{handler: entry, platform: platform(base, name)}
		c.Handlers = append(c.Handlers, name)
	}
	slices.Sort(c.Handlers)
	return n.change(c, ours)
}

// before returns the configuration as it is; it can be nil without a main file.
func (n Node) before() (*check.Config, error) {
	text, err := readFile(n.Config)
	if err != nil {
		return nil, err
	}
	c, err := n.Load(n.Config)
	// It may as well be an imported file that does not exist.
	if err != nil && (text != nil || !errors.Is(err, fs.ErrNotExist)) {
		return nil, fmt.Errorf("containerd cannot load its configuration as it is: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// platform is the handler's entry in the section of CRI's image service, if that
// says otherwise.
func platform(base *check.Config, name string) table {
	if p, ok := base.Plugins.Images.RuntimePlatforms[name]; ok && p.Snapshotter != check.Snapshotter {
		return table{"snapshotter": check.Snapshotter}
	}
	return nil
}

// Disable makes the change that takes back what Enable did for these handlers; for
// all when none is named. A handler that Enable did not turn on gives
// errdefs.ErrNotFound.
func (n Node) Disable(handlers []string) (Change, error) {
	ours, err := n.read()
	if err != nil {
		return Change{}, err
	}
	before, err := n.before()
	if err != nil {
		return Change{}, err
	}
	if len(handlers) == 0 {
		handlers = slices.Collect(maps.Keys(ours))
	}
	c := Change{Before: before}
	for _, name := range handlers {
		if slices.Contains(c.Handlers, name) {
			continue
		}
		if ours[name] == nil {
			why := "it is not on"
			if before != nil {
				if r, ok := before.Plugins.Runtime.Containerd.Runtimes[name]; ok && before.EffectiveSnapshotter(r) == check.Snapshotter {
					why = fmt.Sprintf("it is turned on by another file (%s), which has to be changed there", n.where(name))
				}
			}
			return Change{}, fmt.Errorf("guest pull was not turned on for handler %q by this command: %s: %w", name, why, errdefs.ErrNotFound)
		}
		delete(ours, name)
		c.Handlers = append(c.Handlers, name)
	}
	slices.Sort(c.Handlers)
	return n.change(c, ours)
}

// change makes files out of the settings and tries them. All handlers that have
// settings have to be on in the end.
func (n Node) change(c Change, ours map[string]*settings) (Change, error) {
	main, err := n.main(len(ours) > 0)
	if err != nil {
		return Change{}, err
	}
	for _, late := range []bool{false, true} {
		files := map[string][]byte{n.dropIn(): nil, n.late(): nil}
		if len(ours) > 0 {
			text, err := encode(ours, nil)
			if err != nil {
				return Change{}, err
			}
			files[n.dropIn()] = text
			if late {
				files[n.late()] = text
				if files[n.dropIn()], err = encode(nil, []string{n.late()}); err != nil {
					return Change{}, err
				}
			}
		}
		files[n.Config] = main
		after, err := n.try(files)
		if err != nil {
			return Change{}, err
		}
		off := slices.DeleteFunc(slices.Sorted(maps.Keys(ours)), func(name string) bool {
			r, ok := after.Plugins.Runtime.Containerd.Runtimes[name]
			return ok && after.EffectiveSnapshotter(r) == check.Snapshotter && platform(after, name) == nil
		})
		if len(off) > 0 && late {
			return Change{}, fmt.Errorf("%s: another file (%s) wins over %s and sets another snapshotter; change it there: %w",
				strings.Join(off, ", "), n.where(off[0]), n.dropIn(), errdefs.ErrFailedPrecondition)
		}
		if len(off) > 0 {
			continue
		}
		c.After = after
		// A file that imports the late one by its name is never without it.
		order := []string{n.late(), n.dropIn(), n.Config}
		if files[n.late()] == nil {
			slices.Reverse(order)
		}
		for _, path := range order {
			old, err := readFile(path)
			if err != nil {
				return Change{}, err
			}
			if !bytes.Equal(old, files[path]) || (old == nil) != (files[path] == nil) {
				c.Files = append(c.Files, File{Path: path, Old: old, New: files[path]})
			}
		}
		return c, nil
	}
	return c, nil
}

func (n Node) dropIn() string { return filepath.Join(n.confD(), DropIn) }
func (n Node) late() string   { return filepath.Join(n.confD(), Late) }

// settings are what the drop-in has of one handler.
type settings struct{ handler, platform table }

// read returns what the drop-in has, by handler.
func (n Node) read() (map[string]*settings, error) {
	ours := map[string]*settings{}
	text, err := readFile(n.dropIn())
	if err != nil || text == nil {
		return ours, err
	}
	if late, err := readFile(n.late()); err != nil {
		return nil, err
	} else if late != nil {
		text = late
	}
	var t struct {
		Plugins map[string]table `toml:"plugins"`
	}
	edited := fmt.Errorf("%s was not written by this command, or was changed since; move it away, or bring what was added into another file: %w",
		n.dropIn(), errdefs.ErrFailedPrecondition)
	if err := toml.Unmarshal(text, &t); err != nil {
		return nil, edited
	}
	containerd, _ := t.Plugins[runtimeURI]["containerd"].(table)
	runtimes, _ := containerd["runtimes"].(table)
	platforms, _ := t.Plugins[imagesURI]["runtime_platforms"].(table)
	for name, v := range runtimes {
		s := &settings{}
		s.handler, _ = v.(table)
		s.platform, _ = platforms[name].(table)
		ours[name] = s
	}
	if again, err := encode(ours, nil); err != nil || !bytes.Equal(again, text) {
		return nil, edited
	}
	return ours, nil
}

// encode writes a drop-in. It is in version 3 of the configuration, which all
// versions of containerd read that have the snapshotter.
func encode(ours map[string]*settings, imports []string) ([]byte, error) {
	t := struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports,omitempty"`
		Plugins table    `toml:"plugins,omitempty"`
	}{Version: 3, Imports: imports}
	if len(ours) > 0 {
		runtimes, platforms := table{}, table{}
		for name, s := range ours {
			runtimes[name] = s.handler
			if s.platform != nil {
				platforms[name] = s.platform
			}
		}
		t.Plugins = table{runtimeURI: table{"containerd": table{"runtimes": runtimes}}}
		if len(platforms) > 0 {
			t.Plugins[imagesURI] = table{"runtime_platforms": platforms}
		}
	}
	text, err := toml.Marshal(t)
	if err != nil {
		return nil, err
	}
	// Without the tables that have nothing but tables in them.
	var b bytes.Buffer
	b.WriteString(header)
	lines := slices.Collect(bytes.Lines(text))
	for i, l := range lines {
		if i+1 == len(lines) || l[0] != '[' || lines[i+1][0] != '[' {
			b.Write(l)
		}
	}
	return b.Bytes(), nil
}

// try loads the configuration that would be there with these files, of which nil is
// one that is not. The main file is copied to a directory of its own, where it
// imports what it would import and the files where they are now.
func (n Node) try(files map[string][]byte) (*check.Config, error) {
	dir, err := os.MkdirTemp("", "guest-pull-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	text, ok := files[n.Config]
	if !ok {
		if text, err = readFile(n.Config); err != nil {
			return nil, err
		}
	}
	main := table{}
	if err := toml.Unmarshal(text, &main); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", n.Config, err, errdefs.ErrFailedPrecondition)
	}
	if text == nil {
		main["version"] = 3
	}
	patterns, err := n.imports(text)
	if err != nil {
		return nil, err
	}
	// Where a file is while it is tried.
	place := func(path string) string { return filepath.Join(dir, filepath.Base(path)) }
	imports := []string{}
	for _, pattern := range patterns {
		found := []string{pattern}
		if strings.Contains(pattern, "*") {
			if found, err = filepath.Glob(pattern); err != nil {
				return nil, fmt.Errorf("%s: imports %q: %w", n.Config, pattern, err)
			}
			if hit, err := filepath.Match(pattern, n.dropIn()); err == nil && hit && !slices.Contains(found, n.dropIn()) {
				found = append(found, n.dropIn())
				slices.Sort(found)
			}
		}
		for _, path := range found {
			text, ours := files[path]
			switch {
			case !ours:
				imports = append(imports, path)
			case text != nil:
				imports = append(imports, place(path))
			}
		}
	}
	main["imports"] = imports
	write := func(path string, text []byte) {
		err = errors.Join(err, os.WriteFile(place(path), text, 0o600))
	}
	text, err = toml.Marshal(main)
	write(n.Config, text)
	for path, text := range files {
		if path != n.Config && text != nil {
			write(path, bytes.ReplaceAll(text, []byte(n.late()), []byte(place(n.late()))))
		}
	}
	if err != nil {
		return nil, err
	}
	c, err := n.Load(place(n.Config))
	if err != nil {
		// With the names that the files are to have.
		says := strings.ReplaceAll(err.Error(), place(n.Config), n.Config)
		for path := range files {
			says = strings.ReplaceAll(says, place(path), path)
		}
		return nil, fmt.Errorf("containerd could not load the configuration: %s: %w", says, errdefs.ErrFailedPrecondition)
	}
	c.Path = n.Config
	return c, nil
}

// Apply writes the files. When one cannot be written, those before it are put back.
func (c Change) Apply() error {
	for i, f := range c.Files {
		if err := replaceFile(f.Path, f.New); err != nil {
			for _, done := range slices.Backward(c.Files[:i]) {
				err = errors.Join(err, replaceFile(done.Path, done.Old))
			}
			return fmt.Errorf("nothing was changed: %w", err)
		}
	}
	return nil
}

// where names the files that set a handler.
func (n Node) where(handler string) string {
	var found []string
	for _, path := range check.LoadedFiles(check.Host{}, n.Config) {
		b, err := os.ReadFile(path)
		if err == nil && path != n.dropIn() && path != n.late() && bytes.Contains(b, []byte(handler)) && bytes.Contains(b, []byte("runtime")) {
			found = append(found, path)
		}
	}
	if len(found) == 0 {
		return n.Config
	}
	return strings.Join(found, ", ")
}

// readFile returns nil for a file that does not exist, and never nil for one that
// does.
func readFile(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && b == nil {
		b = []byte{}
	}
	return b, err
}

// replaceFile puts text at path, or removes it for nil: a reader sees the old file
// or the new one, after a power failure too.
func replaceFile(path string, text []byte) (retErr error) {
	dir := filepath.Dir(path)
	if text == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// One that is a link stays a link.
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path, dir = to, filepath.Dir(to)
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			os.Remove(f.Name()) //nolint:errcheck // it is not there in most cases
		}
	}()
	_, err = f.Write(text)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

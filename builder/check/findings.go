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

package check

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

const confD = "/etc/containerd/conf.d"

// checkImports finds drop-in files that containerd does not read: it reads them
// only if the main file exists and imports them.
func (c *checker) checkImports() {
	loaded := LoadedFiles(c.Host, c.Config.Path)
	var lost []string
	severity := Warning
	for _, f := range c.Host.glob(confD + "/*.toml") {
		if slices.Contains(loaded, f) {
			continue
		}
		lost = append(lost, f)
		if b, err := c.Host.read(f); err == nil && bytes.Contains(b, []byte(Snapshotter)) && hasSettings(b) {
			severity = Error
		}
	}
	if len(lost) == 0 {
		return
	}
	remedy := fmt.Sprintf("add imports = [%q] at the top of %s, and restart containerd", confD+"/*.toml", c.Config.Path)
	problem := c.Config.Path + " does not import it"
	if !c.Host.exists(c.Config.Path) {
		remedy = fmt.Sprintf("create %s with the lines version = 4 and imports = [%q], and restart containerd", c.Config.Path, confD+"/*.toml")
		problem = c.Config.Path + " does not exist"
	}
	c.add(severity, "conf.d", strings.Join(lost, ", ")+" is not read: "+problem,
		"what is set there has no effect: a handler that is mapped to the snapshotter there is not", remedy)
}

// hasSettings says whether a file sets anything but its version. The package's
// own drop-in has everything commented out.
func hasSettings(b []byte) bool {
	var t map[string]any
	if err := toml.Unmarshal(b, &t); err != nil {
		return true
	}
	delete(t, "version")
	return len(t) > 0
}

// LoadedFiles returns the configuration files that containerd reads when its main
// one is at path: itself and what is imported (cmd/containerd/server/config).
func LoadedFiles(h Host, path string) (loaded []string) {
	pending := []string{path}
	for len(pending) > 0 {
		path := pending[0]
		pending = pending[1:]
		b, err := h.read(path)
		if err != nil || slices.Contains(loaded, path) {
			continue
		}
		loaded = append(loaded, path)
		var t struct {
			Imports []string `toml:"imports"`
		}
		if err := toml.Unmarshal(b, &t); err != nil {
			continue
		}
		for _, i := range t.Imports {
			i = filepath.Clean(i)
			if !filepath.IsAbs(i) {
				i = filepath.Join(filepath.Dir(path), i)
			}
			if strings.Contains(i, "*") {
				pending = append(pending, h.glob(i)...)
			} else {
				pending = append(pending, i)
			}
		}
	}
	return loaded
}

func (c *checker) checkUnknownKeys() {
	for _, k := range c.Config.UnknownKeys {
		c.add(Warning, "unknown-key", "containerd ignores a key that it does not know: "+k,
			"what it was meant to set is not set; containerd only logs it",
			"correct or remove it; `containerd config default` shows all keys of a section")
	}
}

// checkProxyPlugin finds a proxy plugin of the same name. registry.Register
// panics for the second of two plugins with one ID.
func (c *checker) checkProxyPlugin() {
	p, ok := c.Config.ProxyPlugins[Snapshotter]
	if !ok || (p.Type != "snapshot" && p.Type != "io.containerd.snapshotter.v1") {
		return
	}
	c.add(Error, "proxy-plugin", fmt.Sprintf("[proxy_plugins.%s] is still configured (address %s)", Snapshotter, p.Address),
		"the snapshotter is part of this containerd; with a proxy plugin of the same name containerd ends when it starts (\"plugin: id already registered\")",
		fmt.Sprintf("remove [proxy_plugins.%s], keep the handlers' snapshotter = %q, and set root_path in %s to the old daemon's root if its containers are to live on",
			Snapshotter, Snapshotter, section(PluginURI)))
}

func (c *checker) checkPlugin() {
	if slices.Contains(c.Config.DisabledPlugins, PluginURI) {
		c.add(Error, "plugin", PluginURI+" is in disabled_plugins", "the snapshotter does not start, so no pod of its handlers does",
			"remove it from disabled_plugins and restart containerd")
		return
	}
	d := c.Daemon
	switch {
	case d.Err != nil:
		c.add(Info, "daemon", fmt.Sprintf("containerd could not be asked at %s: %v", d.Address, d.Err),
			"it is not known whether the running containerd has the snapshotter; everything else was checked from the files",
			"start containerd, or give the address of its socket: containerd --address=... guest-pull check")
	case !d.HasPlugin:
		c.add(Error, "plugin", fmt.Sprintf("the running containerd (%s) does not have the snapshotter", d.Binary),
			"it is another program, or was started before this one was installed: no pod of the snapshotter's handlers starts",
			"restart containerd; if that does not help, let its systemd unit run the containerd that has the snapshotter (systemctl cat containerd shows which it runs)")
	case d.PluginErr != "":
		c.add(Error, "plugin", "the snapshotter did not start: "+d.PluginErr, "no pod of its handlers starts",
			"do what the message says and restart containerd")
	}
}

// checkCRI finds a containerd that serves no kubelet. Docker's packages come with
// CRI disabled, and a wrong value in the section of a handler ends all of CRI.
func (c *checker) checkCRI() {
	const check = "cri"
	for _, uri := range []string{criURI, runtimeURI, imagesURI} {
		if slices.Contains(c.Config.DisabledPlugins, uri) {
			c.add(Error, check, uri+" is in disabled_plugins", "containerd does not serve kubelet, so no pod starts",
				"remove it from disabled_plugins and restart containerd")
			return
		}
	}
	runtimes := c.Config.Plugins.Runtime.Containerd.Runtimes
	for _, name := range slices.Sorted(maps.Keys(runtimes)) {
		// As ValidateRuntimeConfig of CRI has it (internal/cri/config/config.go).
		if u := runtimes[name].UnresolvedUsers; !slices.Contains([]string{"", "warn", "refuse"}, u) {
			c.add(Error, check, fmt.Sprintf("handler %q: unresolved_users = %q", name, u), "CRI does not start with it, so no pod of any handler does",
				fmt.Sprintf("set it to \"warn\" or \"refuse\" in %s, or remove it", section(runtimeURI, "containerd", "runtimes", name)))
			return
		}
	}
	switch d := c.Daemon; {
	case d.Err != nil:
	case !d.HasCRI:
		c.add(Error, check, fmt.Sprintf("the running containerd (%s) does not have CRI", d.Binary), "it does not serve kubelet, so no pod starts",
			"restart containerd, if its configuration was changed since; else it was built without CRI")
	case d.CRIErr != "":
		c.add(Error, check, "CRI did not start: "+d.CRIErr, "containerd does not serve kubelet, so no pod of any handler starts",
			"do what the message says and restart containerd")
	}
}

func (c *checker) checkRoot() {
	root := c.Config.snapshotterRoot()
	const check = "root"
	why := "the snapshotter does not start, so no pod of its handlers does"
	key := "root_path in " + section(PluginURI)
	if !filepath.IsAbs(root) {
		c.add(Error, check, fmt.Sprintf("root_path = %q is not an absolute path", root), why, "correct "+key)
		return
	}
	if err := c.Host.usable(c.Host.nearest(root)); err != nil {
		c.add(Error, check, fmt.Sprintf("the snapshotter's root %s cannot be used: %v", root, err), why,
			"make it writable, on ext4, XFS (ftype=1) or another file system that overlayfs can use, or name another directory: "+key)
		return
	}
	db := filepath.Join(root, "metadata.db")
	// A containerd whose plugin runs has the lock itself.
	if (c.Daemon.Err != nil || !c.Daemon.HasPlugin) && c.Host.locked(db) {
		c.add(Error, check, fmt.Sprintf("another process has %s open", db), why,
			"stop the older snapshotter daemon (fuser "+db+" tells which process it is), or give the snapshotter a directory of its own: "+key)
	}
}

func (c *checker) checkHelpers() {
	mountType := c.Config.Plugins.Snapshotter.MountType
	if mountType == "" {
		mountType = snapshotter.DefaultMountType
	}
	if err := (snapshotter.Config{MountType: mountType}).Validate(); err != nil {
		c.add(Error, "mount-type", err.Error(), "the snapshotter does not start", "correct mount_type in "+section(PluginURI))
		return
	}
	where := strings.Join(c.Host.Path, ":") + " (" + c.Host.PathSource + ")"
	// Without the patch every CreateContainer mounts.
	severity, why := Error, "containerd mounts a container's root file system on the host through it to look up users and groups; without it no container of the snapshotter is created"
	if c.hasPatch("fsview") {
		severity, why = Warning, "containerd mounts a container's root file system on the host through it where it cannot do without, as ctr's and nerdctl's clients do to look up users; they fail then"
	}
	// For a type "fuse.X" containerd runs exactly this name
	// (core/mount/mount_linux.go).
	if c.Host.lookPath("mount.fuse") == "" {
		remedy := "install the package fuse3"
		if p := c.Host.lookPath("mount.fuse3"); p != "" {
			remedy = fmt.Sprintf("there is a mount.fuse3: ln -s %s %s", p, filepath.Join(filepath.Dir(p), "mount.fuse"))
		}
		c.add(severity, "mount-helper", "mount.fuse is not in containerd's PATH "+where, why, remedy)
	}
	helper := strings.TrimPrefix(mountType, "fuse.")
	if c.Host.lookPath(helper) == "" {
		remedy := fmt.Sprintf("install guest-pull-overlayfs under this name in a directory of that PATH: ln -s guest-pull-overlayfs /usr/local/bin/%s", helper)
		if filepath.IsAbs(helper) {
			remedy = "install guest-pull-overlayfs at this path, or correct mount_type in " + section(PluginURI)
		}
		c.add(severity, "mount-helper", fmt.Sprintf("the mount helper %s is not in containerd's PATH %s", helper, where), why, remedy)
	}
}

func (c *checker) checkPatches() {
	if len(c.Patches) > 0 {
		return
	}
	c.add(Warning, "patches", "this containerd is built without the project's patches",
		"kubelet does not say for which runtime handler it pulls, so images of guest-pull pods are pulled and extracted on the host; and an image or pause image that one kind of pod pulled breaks pods of the other kind",
		"install a build with the patches, or enable the feature gate RuntimeClassInImageCriApi in kubelet and use no image for both kinds of pods")
}

func (c *checker) hasPatch(word string) bool {
	return slices.ContainsFunc(c.Patches, func(p string) bool { return strings.Contains(p, word) })
}

const runcType = "io.containerd.runc.v2"

func (c *checker) checkHandlers(ctx context.Context) {
	conf := c.Config.Plugins.Runtime.Containerd
	if c.Config.Plugins.Images.Snapshotter == Snapshotter {
		c.add(Error, "default-snapshotter", fmt.Sprintf("snapshotter = %q in %s makes it the default", Snapshotter, section(imagesURI)),
			"pods of every handler without a snapshotter of its own, runc's too, get an empty root file system",
			"remove it there, and run containerd guest-pull enable <handler>... for those whose images the guest shall pull")
	}
	mapped := 0
	for _, name := range slices.Sorted(maps.Keys(conf.Runtimes)) {
		r := conf.Runtimes[name]
		if c.Config.EffectiveSnapshotter(r) != Snapshotter {
			if strings.Contains(r.Type, "kata") {
				c.add(Info, "handlers", fmt.Sprintf("handler %q runs Kata with the snapshotter %q", name, c.Config.EffectiveSnapshotter(r)),
					"images of its pods are pulled and unpacked on the host",
					"if they shall be pulled in the guest: containerd guest-pull enable "+name)
			}
			continue
		}
		mapped++
		c.checkHandler(ctx, name, r)
	}
	if mapped == 0 {
		c.add(Warning, "handlers", "no runtime handler is mapped to the snapshotter", "nothing uses it: all images are pulled on the host",
			"containerd guest-pull enable <handler>... for those whose images the guest shall pull")
	}
}

func (c *checker) checkHandler(ctx context.Context, name string, r Runtime) {
	facts := Handler{Name: name, RuntimeType: r.Type}
	defer func() { c.report.Handlers = append(c.report.Handlers, facts) }()

	platform := section(imagesURI, "runtime_platforms", name)
	if p, ok := c.Config.Plugins.Images.RuntimePlatforms[name]; ok && p.Snapshotter != Snapshotter {
		used := p.Snapshotter
		if used == "" {
			used = c.Config.Plugins.Images.Snapshotter
		}
		c.add(Error, "runtime-platforms", fmt.Sprintf("handler %q: runtime_platforms says snapshotter = %q, the handler %q", name, used, Snapshotter),
			"images are pulled into the one and containers started from the other: the image is unpacked on the host, or the container is not created",
			fmt.Sprintf("set snapshotter = %q in %s", Snapshotter, platform))
	}
	if r.Type == "" && r.Path == "" {
		c.add(Error, "shim", fmt.Sprintf("handler %q has no runtime_type", name), "no pod of the handler starts",
			"if the file that had it is gone, as Kata was removed: containerd guest-pull disable "+name+"; else set it in "+section(runtimeURI, "containerd", "runtimes", name))
		return
	}
	path, wanted := shimPath(c.Host, r, c.Daemon.Binary)
	if path == "" {
		c.add(Error, "shim", fmt.Sprintf("handler %q: its shim %s is not found", name, wanted), "no pod of the handler starts",
			fmt.Sprintf("install Kata Containers, or name the shim: runtime_path = \"...\" in %s (containerd's PATH is %s, %s)",
				section(runtimeURI, "containerd", "runtimes", name), strings.Join(c.Host.Path, ":"), c.Host.PathSource))
		return
	}
	facts.Shim = path
	if r.Type == runcType || strings.HasPrefix(filepath.Base(path), "containerd-shim-runc-") {
		c.add(Error, "shim", fmt.Sprintf("handler %q is mapped to the snapshotter and runs runc", name),
			"runc has no guest that pulls: its containers get an empty root file system",
			"remove snapshotter from "+section(runtimeURI, "containerd", "runtimes", name))
		return
	}
	s := inspectShim(ctx, c.Host, path)
	facts.Flavour, facts.Version = s.flavour, s.version.text
	kata := strings.Contains(r.Type, "kata") || strings.Contains(filepath.Base(s.program), "kata") || s.version.known()
	switch {
	case !kata:
		c.add(Warning, "shim", fmt.Sprintf("handler %q: %s is no shim of Kata Containers that is known", name, path),
			"whether it pulls images in its guest is not known",
			"make sure that it understands the mount option io.katacontainers.volume")
		return
	case s.flavour == FlavourUnknown:
		c.add(Warning, "shim", fmt.Sprintf("handler %q: it could not be found out whether %s is Kata's Go or Rust shim", name, path),
			"the two recognize a guest-pulled image in different ways, so mount_type and shared_fs could not be checked",
			path+" --version should tell; for a Go shim the mount helper's name has to begin with nydus-overlayfs, for a Rust shim shared_fs has to be \"none\"")
	}
	mountType := c.Config.Plugins.Snapshotter.MountType
	if mountType == "" {
		mountType = snapshotter.DefaultMountType
	}
	if remedy := refusesMount(s, mountType); remedy != "" {
		c.add(Error, "mount-type", fmt.Sprintf("handler %q: the shim %s does not take mount_type = %q", name, s.describe(), mountType),
			"it mounts it on the host instead and says nothing: the container starts with an empty root file system, or fails with \"no such file or directory\" for its command",
			remedy)
	}
	if c.hasPatch("disable_layer_fetch") && !r.DisableLayerFetch {
		c.add(Info, "layer-fetch", fmt.Sprintf("handler %q: disable_layer_fetch is not set", name),
			"a mistake in the configuration or in a pod's annotations can have an image pulled on the host, and nothing says so",
			fmt.Sprintf("set disable_layer_fetch = true in %s: such a pull then fails", section(runtimeURI, "containerd", "runtimes", name)))
	}
	if r.KeepImageDefinedVolumes && c.leavesVolumesOut() && !c.Config.Plugins.Runtime.IgnoreImageDefinedVolumes {
		handler := section(runtimeURI, "containerd", "runtimes", name)
		c.add(Warning, "image-volumes", fmt.Sprintf("handler %q: keep_image_defined_volumes = true in %s", name, handler), volumesHide,
			"remove it, and declare the volumes that are needed (emptyDir) in the pods")
	}
	facts.KataConfig = c.checkKata(name, r, s)
	c.checkSandboxer(name, r, s, facts.KataConfig)
}

func (c *checker) checkTransfer() {
	for _, u := range c.Config.Plugins.Transfer.UnpackConfig {
		if u.Snapshotter == Snapshotter {
			return
		}
	}
	severity, why := Error, "CRI pulls through the transfer service, which refuses the snapshotter (\"no unpack platforms defined\"): no image of its handlers is pulled"
	if c.Config.localPull() {
		severity, why = Warning, "CRI pulls by itself here, but ctr and nerdctl pull through the transfer service, which refuses the snapshotter (\"no unpack platforms defined\")"
	}
	c.add(severity, "unpack-config", "unpack_config in "+section(transferURI)+" leaves the snapshotter out", why,
		fmt.Sprintf("remove unpack_config (the default has it), or add [[plugins.'%s'.unpack_config]] with snapshotter = %q, platform = \"linux\", differ = \"walking\"", transferURI, Snapshotter))
}

func (c *checker) checkImages() {
	if c.Config.Plugins.Snapshotter.ResolveUsers == users.ResolveRegistry {
		c.add(Info, "resolve-users", fmt.Sprintf("resolve_users = %q in %s", users.ResolveRegistry, section(PluginURI)),
			"layers of guest-pulled images are streamed through the host's memory at each first pull, to find their users and groups; nothing of them is kept but those",
			"if not even that may be on the host: resolve_users = \"off\", and name the users that images need in users, or use numbers")
	}
	if d, err := time.ParseDuration(c.Config.Plugins.Images.ImagePullProgressTimeout); err == nil && d <= 0 && !c.hasPatch("without-a-progress-timeout") && (d < 0 || !c.Config.localPull()) {
		c.add(Error, "progress-timeout", fmt.Sprintf("image_pull_progress_timeout = %q in %s", c.Config.Plugins.Images.ImagePullProgressTimeout, section(imagesURI)),
			"with it no pull ends in this containerd, that of the pause image included, or containerd ends itself",
			"set a positive duration, a long one for no timeout: image_pull_progress_timeout = \"24h\"")
	}
	if c.Config.Plugins.Images.DiscardUnpackedLayers {
		c.add(Warning, "discard-unpacked-layers", "discard_unpacked_layers = true in "+section(imagesURI),
			"the layers that runc pods pulled are dropped once unpacked, so another snapshotter has to pull the image again; and CRI pulls by itself, not through the transfer service. It saves nothing for guest-pulled images: their layers are never on the host",
			"remove it, unless the disk space is needed")
	}
	if !c.Config.Plugins.Runtime.IgnoreImageDefinedVolumes && !c.leavesVolumesOut() {
		c.add(Warning, "image-volumes", "ignore_image_defined_volumes = false in "+section(runtimeURI), volumesHide,
			"set ignore_image_defined_volumes = true in "+section(runtimeURI)+" and declare the volumes that are needed (emptyDir) in the pods; it concerns all handlers")
	}
}

const volumesHide = "for each VOLUME that an image declares, containerd mounts a directory of the host over the image's own, and fills it from the image on the host, which is empty: the guest's files in it are hidden"

// leavesVolumesOut says whether this containerd ignores the volumes of images that
// are not on the host.
func (c *checker) leavesVolumesOut() bool { return c.hasPatch("leave-image-defined-volumes-out") }

// tellGuest is how a guest is told about registries.
const tellGuest = "tell the guest: containerd guest-pull guest-config prints what it has to know, for its image (--format cdh) or for pods (--format annotation)"

func (c *checker) checkRegistries() {
	dirs := c.Config.Plugins.Images.Registry.Paths()
	paths := strings.Join(dirs, ":")
	// The transfer service of stock containerd takes the list for one directory.
	ignored := len(dirs) > 1 && !c.Config.localPull() && !c.hasPatch("transfer-honor-all-directories")
	for i, dir := range dirs {
		for _, f := range c.Host.glob(filepath.Join(dir, "*", "hosts.toml")) {
			switch name := filepath.Base(filepath.Dir(f)); {
			case ignored:
				c.add(Error, "config-path", f+" is not read", fmt.Sprintf("config_path = %q is a list of directories, for which the transfer service of this containerd finds no hosts.toml: "+
					"mirrors, certificates and plain HTTP that are configured there are not used", paths),
					fmt.Sprintf("set config_path = %q in %s, or use_local_image_pull = true in %s", dir, section(imagesURI, "registry"), section(imagesURI)))
			case slices.ContainsFunc(dirs[:i], func(d string) bool {
				return c.Host.exists(filepath.Join(d, name)) || c.Host.exists(filepath.Join(d, "_default"))
			}):
				c.add(Warning, "config-path", f+" is not read", fmt.Sprintf("an earlier directory of config_path = %q has %s or _default, and the first directory that has something for a registry is the only one that counts", paths, name),
					"put all of them into one directory")
			default:
				c.checkHosts(f)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Plugins.Images.Registry.Mirrors)) {
		c.mirror(name, section(imagesURI, "registry", "mirrors"), c.Config.Plugins.Images.Registry.Mirrors[name].Endpoints)
	}
	var proxies []string
	for _, k := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		if c.Host.Env[k] != "" {
			proxies = append(proxies, k)
		}
	}
	if len(proxies) > 0 {
		c.add(Warning, "proxy", "containerd reaches registries through a proxy ("+strings.Join(proxies, ", ")+" in its environment)",
			"a guest does not know it and asks the registries directly",
			tellGuest)
	}
}

func (c *checker) mirror(registry, where string, endpoints []string) {
	// A URL can have a password in it, or a token.
	var shown []string
	for _, e := range endpoints {
		scheme, rest, hasScheme := strings.Cut(e, "://")
		if !hasScheme {
			rest = e
		}
		u, err := url.Parse("//" + rest)
		switch {
		case err != nil:
			shown = append(shown, "(no URL)")
		case hasScheme:
			shown = append(shown, scheme+"://"+u.Host+u.EscapedPath())
		default:
			shown = append(shown, u.Host+u.EscapedPath())
		}
	}
	c.add(Warning, "mirrors", fmt.Sprintf("%s: images of %s are pulled from the mirror %s", where, registry, strings.Join(shown, ", ")),
		"a guest does not know the mirror: it asks "+registry+" itself, which may be unreachable, limit its pulls, or have another image under the tag",
		tellGuest)
}

// checkHosts looks at a hosts.toml (core/remotes/docker/config/hosts.go).
func (c *checker) checkHosts(file string) {
	b, err := c.Host.read(file)
	if err != nil {
		return
	}
	type host struct {
		CA         any   `toml:"ca"`
		Client     any   `toml:"client"`
		SkipVerify *bool `toml:"skip_verify"`
		Header     any   `toml:"header"`
	}
	var t struct {
		host
		Server string          `toml:"server"`
		Hosts  map[string]host `toml:"host"`
	}
	if err := toml.Unmarshal(b, &t); err != nil {
		c.add(Warning, "mirrors", file+" cannot be read: "+err.Error(), "containerd ignores it", "correct it")
		return
	}
	registry := filepath.Base(filepath.Dir(file))
	// A colon cannot stand in every file name: "host_5000_" is host:5000.
	if name, ok := strings.CutSuffix(registry, "_"); ok && strings.Contains(name, "_") {
		i := strings.LastIndex(name, "_")
		registry = name[:i] + ":" + name[i+1:]
	}
	if registry == "_default" {
		registry = "all registries"
	}
	var mirrors []string
	special := t.CA != nil || t.Client != nil || t.Header != nil || (t.SkipVerify != nil && *t.SkipVerify)
	own := hostOf(t.Server)
	for _, u := range slices.Sorted(maps.Keys(t.Hosts)) {
		if h := hostOf(u); h != registry && h != own {
			mirrors = append(mirrors, u)
		}
		h := t.Hosts[u]
		special = special || h.CA != nil || h.Client != nil || h.Header != nil || (h.SkipVerify != nil && *h.SkipVerify)
	}
	if own != "" && own != registry && !isDockerHub(registry, own) {
		mirrors = append(mirrors, t.Server)
	}
	if len(mirrors) > 0 {
		c.mirror(registry, file, mirrors)
	}
	if special {
		c.add(Warning, "registry-trust", fmt.Sprintf("%s: %s is reached with certificates or headers of its own, or unverified", file, registry),
			"a guest does not have them and refuses the registry, or is refused",
			tellGuest+"; it says what a guest cannot be told, too")
	}
}

func isDockerHub(registry, server string) bool {
	return registry == "docker.io" && slices.Contains([]string{"registry-1.docker.io", "index.docker.io"}, server)
}

func hostOf(server string) string {
	if server == "" {
		return ""
	}
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil {
		return server
	}
	return u.Host
}

// older is a daemon that this snapshotter takes the place of.
type older struct {
	name    string
	units   []string
	sockets []string
	roots   []string
}

var olderDaemons = []older{{
	name:    "the older guest-pull daemon",
	units:   []string{"guest-pull-snapshotter.service", "containerd-guest-pull-grpc.service"},
	sockets: []string{"/run/containerd-guest-pull-grpc/containerd-guest-pull-grpc.sock"},
	roots:   []string{"/var/lib/containerd-guest-pull-grpc"},
}, {
	name:    "nydus-snapshotter",
	units:   []string{"nydus-snapshotter.service", "nydus-for-kata-tee.service"},
	sockets: []string{"/run/containerd-nydus/containerd-nydus-grpc.sock", "/run/nydus-for-kata-tee/containerd-nydus-grpc.sock"},
	roots:   []string{"/var/lib/containerd-nydus", "/var/lib/containerd-nydus-grpc", "/var/lib/nydus-for-kata-tee"},
}}

var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

func (c *checker) checkLeftovers() {
	for _, d := range olderDaemons {
		if c.inUse(d) {
			continue
		}
		for _, unit := range d.units {
			for _, dir := range unitDirs {
				if c.Host.exists(filepath.Join(dir, unit)) {
					c.add(Warning, "old-unit", fmt.Sprintf("the unit of %s is installed: %s", d.name, filepath.Join(dir, unit)),
						"no handler uses it; started again with the boot, it may take the database that this snapshotter needs",
						fmt.Sprintf("systemctl disable --now %s; rm %s; systemctl daemon-reload", unit, filepath.Join(dir, unit)))
					break // /lib may be /usr/lib
				}
			}
		}
		for _, s := range d.sockets {
			if c.Host.exists(s) {
				c.add(Warning, "old-socket", fmt.Sprintf("the socket of %s is there: %s", d.name, s), "no handler uses it; the daemon runs still, or was killed",
					"stop the daemon, then: rm -r "+filepath.Dir(s))
			}
		}
		for _, r := range d.roots {
			if r != filepath.Clean(c.Config.snapshotterRoot()) && c.Host.exists(r) {
				c.add(Warning, "old-root", fmt.Sprintf("the directory of %s is there: %s", d.name, r), "nothing uses what is in it; it takes disk space",
					fmt.Sprintf("when no container of the daemon runs any more (containerd guest-pull status), and the daemon is stopped: rm -rf %s", r))
			}
		}
	}
}

// inUse says whether a handler, or the default, uses a daemon through a proxy
// plugin other than that of this snapshotter's name.
func (c *checker) inUse(d older) bool {
	for name, p := range c.Config.ProxyPlugins {
		if name == Snapshotter || !slices.Contains(d.sockets, p.Address) {
			continue
		}
		if c.Config.Plugins.Images.Snapshotter == name {
			return true
		}
		for _, r := range c.Config.Plugins.Runtime.Containerd.Runtimes {
			if r.Snapshotter == name {
				return true
			}
		}
	}
	return false
}

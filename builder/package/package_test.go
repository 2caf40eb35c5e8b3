//go:build packages

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

// The tests install the packages of `make package` in a Debian root file system
// and look at what a person would look at, and build them there from their source
// packages. `make test-packages` runs them; they need root, Debian's archive, and the
// variables DIST (the packages), DEBIAN_ROOT (what debootstrap made, which is not
// changed), LINE, LINES and ARCHES.
package packagetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	configFile = "/etc/containerd/config.toml"
	dropIn     = "/etc/containerd/conf.d/50-guest-pull.toml"
	importLine = `imports = ["/etc/containerd/conf.d/*.toml"]`
	handler    = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-test]
  runtime_type = "io.containerd.kata-test.v2"
  snapshotter = "guest-pull"
`
)

// The lines of containerd that there are packages of. What is not about both is
// tested with the first one.
var (
	line, other = lines()
	pkg         = "containerd-guest-pull-" + line
	archive     = pkg + "-*"
	otherPkg    = "containerd-guest-pull-" + other
)

func lines() (first, second string) {
	first = os.Getenv("LINE")
	for l := range strings.FieldsSeq(os.Getenv("LINES")) {
		if l != first {
			second = l
		}
	}
	return first, second
}

// deb and rpm are the packages for this machine, as the roots see them.
func deb(t *testing.T, pkg string) string {
	t.Helper()
	return "/packages/" + filepath.Base(one(t, pkg+"_*_"+runtime.GOARCH+".deb"))
}

func rpm(t *testing.T, pkg string) string {
	t.Helper()
	return "/packages/" + filepath.Base(one(t, pkg+"-*."+rpmArch(runtime.GOARCH)+".rpm"))
}

// What Debian and rpm call an architecture of Go's.
func debArch(arch string) string {
	if arch == "ppc64le" {
		return "ppc64el"
	}
	return arch
}

func rpmArch(arch string) string {
	if name, ok := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]; ok {
		return name
	}
	return arch
}

func arches(t *testing.T) []string { return strings.Fields(os.Getenv("ARCHES")) }

func variable(t *testing.T, name string) string {
	t.Helper()
	v := os.Getenv(name)
	require.NotEmpty(t, v, "%s is not set; run make test-packages", name)
	v, err := filepath.Abs(v)
	require.NoError(t, err)
	return v
}

// one returns the only file of the distribution that matches.
func one(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(variable(t, "DIST"), pattern))
	require.NoError(t, err)
	require.Len(t, found, 1, pattern)
	return found[0]
}

func host(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s %s: %s", name, strings.Join(args, " "), stderr.String())
	return string(out)
}

// root is a Debian of the test's own: an overlay on DEBIAN_ROOT.
type root struct {
	t   *testing.T
	dir string
	// goroot and gocache are directories of this machine that are there, too: as
	// /usr/lib/go-1.26, where Debian has it, and /var/cache/go.
	goroot, gocache string
}

func newRoot(t *testing.T) *root {
	t.Helper()
	r := &root{t: t, dir: t.TempDir()}
	for _, d := range []string{"upper", "work", "merged"} {
		require.NoError(t, os.Mkdir(filepath.Join(r.dir, d), 0o755))
	}
	return r
}

// enter mounts everything in a mount namespace and runs everything in a PID
// namespace, so that whatever happens nothing stays mounted or running.
const enter = `
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$DEBIAN_ROOT,upperdir=$DIR/upper,workdir=$DIR/work" "$DIR/merged"
cd "$DIR/merged"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p packages
mount --bind "$DIST" packages
[ -z "$GOROOT_DIR" ] || { mkdir -p usr/lib/go-1.26; mount --bind "$GOROOT_DIR" usr/lib/go-1.26; }
[ -z "$GOCACHE_DIR" ] || { mkdir -p var/cache/go; mount --bind "$GOCACHE_DIR" var/cache/go; }
cp /etc/resolv.conf etc/resolv.conf
exec chroot . /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C sh -c "$SCRIPT" </dev/null
`

// try runs a script in the root. offline: without a network.
func (r *root) try(script string, offline bool) (string, error) {
	r.t.Helper()
	args := []string{"--mount", "--pid", "--fork", "--kill-child"}
	if offline {
		args = append(args, "--net")
	}
	cmd := exec.Command("unshare", append(args, "sh", "-c", enter)...)
	cmd.Env = append(os.Environ(), "DIR="+r.dir, "SCRIPT="+script, "GOROOT_DIR="+r.goroot, "GOCACHE_DIR="+r.gocache,
		"DIST="+variable(r.t, "DIST"), "DEBIAN_ROOT="+variable(r.t, "DEBIAN_ROOT"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// boot makes systemd run the root as if it were a machine, until the test ends, and
// returns what runs a script in it. It has no network, a cgroup hierarchy of its own
// without controllers, and devices that do no harm. systemd is only there when the
// root is its own (pivot_root): its name is what tells that it can be entered.
const boot = `
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$DEBIAN_ROOT,upperdir=$DIR/upper,workdir=$DIR/work" "$DIR/merged"
cd "$DIR/merged"
mount -t tmpfs tmpfs dev
for d in null zero full random urandom tty fuse; do
	touch dev/$d
	mount --bind /dev/$d dev/$d
done
mkdir -p dev/pts dev/shm packages
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --bind "$DIST" packages
pivot_root . mnt
umount -l /mnt
exec env -i container=test /lib/systemd/systemd --unit=multi-user.target --show-status=no </dev/null
`

const (
	newCgroup = `
set -e
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$DIR/cgroup"
mkdir "$DIR/cgroup/$CGROUP"
echo $$ >"$DIR/cgroup/$CGROUP/cgroup.procs"
exec unshare --mount --pid --fork --kill-child --net --uts --ipc --cgroup sh -c "$BOOT"
`
	removeCgroup = `
set -e
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$DIR/cgroup"
find "$DIR/cgroup/$CGROUP" -depth -type d -exec rmdir {} +
`
)

// waitFor is a function of the scripts that boot's function runs.
const waitFor = `
set -e
wait_for() {
	n=0
	until eval "$1"; do
		n=$((n + 1))
		[ $n -lt 300 ] || { echo "waited in vain for: $1"; exit 1; }
		sleep 0.1
	done
}
`

func (r *root) boot() func(script string) string {
	t := r.t
	t.Helper()
	require.NoError(t, os.Mkdir(filepath.Join(r.dir, "cgroup"), 0o755))
	command := func(script string) (*exec.Cmd, *bytes.Buffer) {
		out := new(bytes.Buffer)
		cmd := exec.Command("unshare", "--mount", "sh", "-c", script)
		cmd.Env = append(os.Environ(), "DIR="+r.dir, "BOOT="+boot, fmt.Sprintf("CGROUP=guest-pull-test-%d", os.Getpid()),
			"DIST="+variable(t, "DIST"), "DEBIAN_ROOT="+variable(t, "DEBIAN_ROOT"))
		cmd.Stdout, cmd.Stderr = out, out
		// The machine does not outlive tests that are interrupted.
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd, out
	}
	machine, out := command(newCgroup)
	require.NoError(t, machine.Start())
	t.Cleanup(func() {
		// Takes its child, the machine's first process, with it.
		_ = machine.Process.Kill()
		_ = machine.Wait()
		if t.Failed() {
			t.Log(out)
		}
		// The kernel takes a moment to end all the others.
		var err error
		for range 100 {
			remove, out := command(removeCgroup)
			if err = remove.Run(); err == nil {
				return
			}
			err = fmt.Errorf("%w: %s", err, out)
			time.Sleep(100 * time.Millisecond)
		}
		assert.NoError(t, err)
	})

	var init string
	inside := func(args ...string) *exec.Cmd {
		return exec.Command("nsenter", append([]string{"--target", init, "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup",
			"env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"HOME=/root", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"}, args...)...)
	}
	require.Eventually(t, func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", machine.Process.Pid))
		init = strings.TrimSpace(string(children))
		comm, _ := os.ReadFile("/proc/" + init + "/comm")
		return init != "" && string(comm) == "systemd\n" && inside("test", "-S", "/run/systemd/private").Run() == nil
	}, 30*time.Second, 100*time.Millisecond)

	run := func(script string) string {
		t.Helper()
		b, err := inside("sh", "-c", waitFor+script).CombinedOutput()
		require.NoError(t, err, "%s\n%s", script, b)
		return string(b)
	}
	t.Log("systemd is " + run("systemctl is-system-running --wait || systemctl --no-pager --failed"))
	return run
}

func (r *root) run(script string) string {
	r.t.Helper()
	out, err := r.try("set -e\n"+script, false)
	require.NoError(r.t, err, "%s\n%s", script, out)
	return out
}

func (r *root) install() string {
	r.t.Helper()
	return r.run("apt-get install -y --no-install-recommends " + deb(r.t, pkg))
}

// dump is the configuration in force.
func (r *root) dump() map[string]any {
	r.t.Helper()
	var m map[string]any
	// Warnings go to standard error.
	require.NoError(r.t, toml.Unmarshal([]byte(r.run("containerd config dump 2>/dev/null")), &m))
	return m
}

func lookup(m map[string]any, path ...string) any {
	var v any = m
	for _, p := range path {
		m, _ = v.(map[string]any)
		v = m[p]
	}
	return v
}

// handlers are the names of the runtime handlers in force, with the snapshotter.
func (r *root) handlers() map[string]string {
	r.t.Helper()
	found := map[string]string{}
	runtimes, _ := lookup(r.dump(), "plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes").(map[string]any)
	for name, v := range runtimes {
		found[name], _ = v.(map[string]any)["snapshotter"].(string)
	}
	return found
}

func (r *root) installed() string {
	return r.run("dpkg-query -W -f '${Package} ${db:Status-Abbrev}\n' 'containerd*' 2>/dev/null | tr -s ' ' | sed 's/ $//' | grep -v ' un$' || true")
}

// What a person tries first on a node that never had containerd.
func TestInstall(t *testing.T) {
	r := newRoot(t)
	out := r.install()
	assert.NotContains(t, out, "does not import")

	for program, want := range map[string]string{
		"containerd --version":                         "+guest-pull.",
		"ctr --version":                                "+guest-pull.",
		"containerd-shim-runc-v2 -v":                   "+guest-pull.",
		"guest-pull-overlayfs --version":               "guest-pull-overlayfs ",
		"nydus-overlayfs-guest-pull --version":         "guest-pull-overlayfs ",
		"containerd guest-pull version":                "patches:",
		"readlink /usr/bin/nydus-overlayfs-guest-pull": "guest-pull-overlayfs\n",
		"command -v runc mount.fuse":                   "runc\n",
		"systemctl is-enabled containerd":              "enabled",
		"dpkg --verify " + pkg + " && echo good":       "good\n",
	} {
		assert.Contains(t, r.run(program), want, program)
	}
	// A warning about the unit is output, too.
	assert.Empty(t, r.run("systemd-analyze verify --man=no --recursive-errors=no /lib/systemd/system/containerd.service 2>&1 | grep -F containerd || true"))

	for _, page := range []string{"man5/containerd-config.toml.5", "man8/containerd.8", "man8/containerd-config.8", "man8/ctr.8", "man8/guest-pull-overlayfs.8", "man8/nydus-overlayfs-guest-pull.8"} {
		assert.Contains(t, r.run("zcat /usr/share/man/"+page+".gz"), ".SH NAME", page)
	}
	// The completion has to work with the ctr that it is for.
	assert.Contains(t, r.run(`bash -c '. /usr/share/bash-completion/completions/ctr; complete -p ctr'`), "ctr")
	assert.Contains(t, r.run(`ctr images $(grep -o -m 1 -e '--generate-[a-z]*-completion' /usr/share/bash-completion/completions/ctr)`), "pull")

	t.Run("conf.d is read", func(t *testing.T) {
		assert.Equal(t, "fuse.nydus-overlayfs-guest-pull",
			lookup(r.dump(), "plugins", "io.containerd.snapshotter.v1.guest-pull", "mount_type"))
		assert.NotContains(t, r.handlers(), "kata-test")
		r.run("cat >>" + dropIn + " <<'END'" + handler + "END")
		assert.Equal(t, map[string]string{"runc": "", "kata-test": "guest-pull"}, r.handlers())
	})

	t.Run("the daemon runs, with the plugin and without a network", func(t *testing.T) {
		out, err := r.try(`
set -e
ip link set lo up 2>/dev/null || true
containerd >/tmp/log 2>&1 &
pid=$!
n=0
until ctr version >/dev/null 2>&1; do
	n=$((n + 1)); [ $n -lt 120 ] || { cat /tmp/log; exit 1; }
	kill -0 $pid || { cat /tmp/log; exit 1; }
	sleep 0.5
done
ctr plugins ls id==guest-pull
ctr plugins ls id==cri
echo images: $(ctr -n k8s.io images ls -q)
kill -TERM $pid
wait $pid
echo "exit: $?"
`, true)
		require.NoError(t, err, out)
		assert.Regexp(t, `io.containerd.snapshotter.v1\s+guest-pull\s+linux/\S+\s+ok`, out)
		assert.Regexp(t, `io.containerd.grpc.v1\s+cri\s+\S+\s+ok`, out)
		assert.Contains(t, out, "images:\n")
		assert.Contains(t, out, "exit: 0")
	})

	t.Run("an edited drop-in survives an upgrade without a question", func(t *testing.T) {
		// The same package with another drop-in and a higher version.
		r.run(`
dpkg-deb -R ` + deb(t, pkg) + ` /root/next
sed -i 's/^Version: .*/Version: 99-1/' /root/next/DEBIAN/control
echo '# a comment of a later version' >>/root/next` + dropIn + `
dpkg-deb --build -Znone /root/next /root/next.deb >/dev/null
echo '# a comment of mine' >>` + configFile)
		// dpkg asks which version of the drop-in to take when both have changed, and
		// keeps the node's when told so, as unattended installations are.
		r.run("apt-get install -y -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold /root/next.deb")
		assert.Contains(t, r.installed(), pkg+" ii")
		assert.Contains(t, r.run("cat "+dropIn), "kata-test")
		assert.NotContains(t, r.run("cat "+dropIn), "a later version")
		assert.Contains(t, r.run("cat "+configFile), "a comment of mine")
	})

	t.Run("removal keeps what was edited, purge leaves nothing", func(t *testing.T) {
		r.run("apt-get remove -y " + pkg)
		assert.Contains(t, r.run("cat "+configFile), "a comment of mine")
		assert.Contains(t, r.run("cat "+dropIn), "kata-test")
		assert.Empty(t, r.run("ls -d /usr/bin/containerd* /usr/bin/ctr /usr/bin/*guest-pull* /lib/systemd/system/containerd.service 2>/dev/null || true"))

		r.run("apt-get purge -y " + pkg)
		assert.Empty(t, r.run("find / -xdev -path /proc -prune -o \\( -path '*containerd*' -o -path '*guest-pull*' \\) -not -path '/packages*' -not -path '/var/lib/containerd*' -not -path '/root/*' -not -path '/opt/containerd*' -not -path '/var/lib/apt/*' -not -path '/var/cache/apt/*' -print"))
		assert.NotContains(t, r.installed(), pkg)
	})
}

// Debian's containerd leaves its config.toml, without imports, in a package that
// is removed but not purged. Purging it deletes the file and disables the unit,
// although both belong to the package that is installed by now.
func TestReplaceDebiansContainerd(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends containerd && echo '# a comment of mine' >>" + configFile)
	before := r.run("cat " + configFile)

	out := r.install()
	assert.Equal(t, "containerd rc\n"+pkg+" ii\n", r.installed())
	assert.Equal(t, before, r.run("cat "+configFile))
	assert.Contains(t, out, importLine, "the remedy")
	assert.Contains(t, r.run("containerd --version"), "+guest-pull.")
	assert.Contains(t, r.run("systemctl is-enabled containerd"), "enabled")
	assert.Equal(t, []any{"/usr/lib/cni"}, lookup(r.dump(), "plugins", "io.containerd.cri.v1.runtime", "cni", "bin_dirs"),
		"Debian's configuration, of version 2, is in force")

	// The remedy works, where it says.
	r.run("cat >>" + dropIn + " <<'END'" + handler + "END")
	assert.NotContains(t, r.handlers(), "kata-test")
	r.run("sed -i '1i " + importLine + "' " + configFile)
	assert.Equal(t, map[string]string{"runc": "", "kata-test": "guest-pull"}, r.handlers())
	assert.NotContains(t, r.run("dpkg -i "+deb(t, pkg)), "does not import")
	before = r.run("cat " + configFile)

	t.Run("purging Debian's leaves the node as it is", func(t *testing.T) {
		r.run("apt-get purge -y containerd")
		assert.Equal(t, pkg+" ii\n", r.installed())
		assert.Equal(t, before, r.run("cat "+configFile))
		assert.Contains(t, r.run("systemctl is-enabled containerd"), "enabled")
		assert.Contains(t, r.handlers(), "kata-test")
	})

	t.Run("purge after that leaves nothing", func(t *testing.T) {
		r.run("apt-get purge -y " + pkg)
		assert.Empty(t, r.run("ls -d /etc/containerd /var/lib/containerd-guest-pull 2>/dev/null || true"))
	})
}

// dpkg by itself, without apt, removes a conflicting package only after it has
// unpacked the new one: a file that both have, under two names of one directory,
// would go with it.
func TestReplaceWithDpkgAlone(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends containerd fuse3")
	r.run("dpkg -i --auto-deconfigure -B " + deb(t, pkg))
	assert.Equal(t, "containerd ic\n"+pkg+" ii\n", r.installed())
	assert.Contains(t, r.run("containerd --version"), "+guest-pull.")
	assert.Contains(t, r.run("dpkg --verify "+pkg+" && echo good"), "good")
	assert.Contains(t, r.run("systemctl is-enabled containerd"), "enabled")
}

// Back to Debian's containerd. Nothing of ours may make dpkg ask, and the later
// purge must not hit what is Debian's by then.
func TestBackToDebiansContainerd(t *testing.T) {
	r := newRoot(t)
	r.install()
	r.run("apt-get install -y -qq --no-install-recommends containerd")
	assert.Equal(t, "containerd ii\n"+pkg+" rc\n", r.installed())
	assert.NotContains(t, r.run("containerd --version"), "guest-pull")
	assert.Contains(t, r.run("cat "+configFile), "/usr/lib/cni", "Debian's own configuration")

	r.run("apt-get purge -y " + pkg)
	assert.Contains(t, r.run("cat "+configFile), "/usr/lib/cni")
	assert.Contains(t, r.run("systemctl is-enabled containerd"), "enabled")
	assert.Contains(t, r.run("dpkg --verify containerd && echo good"), "good")
	assert.Empty(t, r.run("ls -d /etc/containerd/conf.d 2>/dev/null || true"))
}

// Both lines are in one repository. Only who asks for it gets a containerd of another
// line: no upgrade does that, and whoever has Debian's keeps it.
func TestRepository(t *testing.T) {
	r := newRoot(t)
	repository := `
mkdir -p /repository && cd /repository
: >Packages
for deb in *.deb; do
	dpkg-deb -f $deb >>Packages
	printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' $deb $(stat -c %s $deb) $(sha256sum $deb | cut -d ' ' -f 1) >>Packages
done
echo 'deb [trusted=yes] file:/repository ./' >/etc/apt/sources.list.d/test.list
apt-get update -qq`
	r.run("mkdir /repository && cp " + deb(t, pkg) + " " + deb(t, otherPkg) + " /repository" + repository)
	version := func(pkg string) string {
		return strings.TrimSpace(r.run("dpkg-query -W -f '${Version}' " + pkg))
	}

	r.run("apt-get install -y -qq --no-install-recommends containerd && apt-get dist-upgrade -y")
	assert.Equal(t, "containerd ii\n", r.installed())

	r.run("apt-get install -y --no-install-recommends " + pkg)
	assert.Equal(t, "containerd rc\n"+pkg+" ii\n", r.installed())
	first := version(pkg)
	assert.Regexp(t, `^`+line+`\.[0-9]+\+guestpull\.[0-9.]+-1$`, first, "containerd's version, and ours")

	// The next patch release of containerd, with the same release of this project.
	next := regexp.MustCompile(`\.([0-9]+)\+`).ReplaceAllString(first, ".99+")
	r.run("dpkg-deb -R " + deb(t, pkg) + " /root/next && sed -i 's/^Version: .*/Version: " + next + "/' /root/next/DEBIAN/control && " +
		"dpkg-deb --build -Znone /root/next /repository/next.deb >/dev/null" + repository + "\napt-get dist-upgrade -y")
	assert.Equal(t, "containerd rc\n"+pkg+" ii\n", r.installed())
	assert.Equal(t, next, version(pkg))

	r.run("echo '# a comment of mine' | tee -a " + dropIn + " >>" + configFile)
	r.run("apt-get install -y " + otherPkg + " && apt-get dist-upgrade -y")
	assert.Contains(t, r.installed(), otherPkg+" ii\n")
	assert.Contains(t, r.installed(), pkg+" rc\n")
	assert.Contains(t, r.run("containerd --version"), " v"+other+".")

	r.run("apt-get install -y " + pkg)
	assert.Contains(t, r.installed(), otherPkg+" rc\n")
	assert.Contains(t, r.installed(), pkg+" ii\n")
	r.run("apt-get purge -y containerd " + otherPkg)
	assert.Equal(t, pkg+" ii\n", r.installed())
	for _, f := range []string{dropIn, configFile} {
		assert.Contains(t, r.run("cat "+f), "a comment of mine", f)
	}
	assert.Contains(t, r.run("systemctl is-enabled containerd"), "enabled")
	r.run("apt-get purge -y " + pkg)
	assert.Empty(t, r.run("ls -d /etc/containerd/conf.d /var/lib/containerd-guest-pull 2>/dev/null || true"))

	for _, order := range [][2]string{
		{"2.3.7+guestpull.0.1.0-1", "2.3.7+guestpull.0.2.0~rc.1-1"},
		{"2.3.7+guestpull.0.2.0~rc.1-1", "2.3.7+guestpull.0.2.0-1"},
		{"2.3.7+guestpull.0.9.0-1", "2.3.10+guestpull.0.1.0-1"},
	} {
		host(t, "dpkg", "--compare-versions", order[0], "lt", order[1])
	}
}

// Others' containerd, as its packages say it: replaced by this one, and this one by it,
// without a question, without a file that gets lost, and with what is in between.
func TestReplaceOthers(t *testing.T) {
	for name, relations := range map[string]string{
		"containerd-stable": "Depends: runc\nProvides: containerd\nConflicts: containerd\nReplaces: containerd\nBreaks: containerd\n",
		// Docker's has a runc of its own.
		"containerd.io": "Provides: containerd, runc\nConflicts: containerd, runc\nReplaces: containerd, runc\n",
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoot(t)
			r.run(`
mkdir -p /root/other/DEBIAN /root/other/usr/bin /root/other/usr/lib/systemd/system /root/other/etc/containerd
cd /root/other
printf 'Package: ` + name + `\nVersion: 2.2.1-1\nArchitecture: all\nMaintainer: test <test@test.invalid>\nDescription: test\n` + strings.ReplaceAll(relations, "\n", `\n`) + `' >DEBIAN/control
for p in containerd ctr containerd-shim-runc-v2; do printf '#!/bin/sh\necho another\n' >usr/bin/$p; chmod +x usr/bin/$p; done
[ ` + name + ` != containerd.io ] || cp usr/bin/ctr usr/bin/runc
printf '[Service]\nExecStart=/usr/bin/containerd\n[Install]\nWantedBy=multi-user.target\n' >usr/lib/systemd/system/containerd.service
echo 'version = 2' >etc/containerd/config.toml
echo /etc/containerd/config.toml >DEBIAN/conffiles
dpkg-deb --build /root/other >/dev/null
apt-get install -y --no-install-recommends /root/other.deb`)
			require.Contains(t, r.run("containerd"), "another")
			r.run("echo '# a comment of mine' >>" + configFile)

			r.install()
			assert.Equal(t, pkg+" ii\n"+name+" rc\n", r.installed())
			assert.Contains(t, r.run("containerd --version; runc --version"), "+guest-pull.")
			assert.NotContains(t, r.run("runc --version"), "another")
			assert.Contains(t, r.run("dpkg --verify "+pkg+" && echo good"), "good")
			assert.Contains(t, r.run("cat "+configFile), "a comment of mine")

			r.run("apt-get install -y --no-install-recommends /root/other.deb")
			assert.Equal(t, pkg+" rc\n"+name+" ii\n", r.installed())
			assert.Contains(t, r.run("containerd; test -e /usr/lib/systemd/system/containerd.service"), "another")
			assert.Contains(t, r.run("cat "+configFile), "a comment of mine")
			r.run("apt-get purge -y " + pkg)
			assert.Contains(t, r.run("cat "+configFile), "a comment of mine")
			assert.Contains(t, r.run("dpkg --verify "+name+" | grep -v "+configFile+" || echo good"), "good")
		})
	}
}

// A package that depends on some version of containerd has to stay installed.
func TestDependencies(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends containerd")
	r.run(`
for p in "docker.io containerd (>= 1.4~)" "docker-ce containerd.io (>= 1.7.27)"; do
	set -- $p
	name=$1; shift
	mkdir -p /root/$name/DEBIAN
	printf 'Package: test-%s\nVersion: 1\nArchitecture: all\nMaintainer: test <test@test.invalid>\nDescription: test\nDepends: %s\n' \
		$name "$*" >/root/$name/DEBIAN/control
	dpkg-deb --build /root/$name >/dev/null
done
apt-get install -y /root/docker.io.deb`)
	r.install()
	r.run("apt-get install -y /root/docker-ce.deb")
	assert.Equal(t, "test-docker-ce ii\ntest-docker.io ii\n",
		r.run("dpkg-query -W -f '${Package} ${db:Status-Abbrev}\n' 'test-*' | tr -s ' ' | sed 's/ $//'"))
}

// Everything that the packages do with a systemd that runs, on a node that has a
// container: from Debian's containerd to this one, a crash, an upgrade and removal.
// The container keeps running, and each containerd can work with it.
func TestBooted(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends containerd fuse3")
	run := r.boot()

	daemon := func() string {
		t.Helper()
		return strings.TrimSpace(run("systemctl show --property MainPID --value containerd"))
	}
	active := func() {
		t.Helper()
		run("wait_for 'ctr version >/dev/null 2>&1'")
		assert.Equal(t, "active\n", run("systemctl is-active containerd"))
	}
	processes := func(name string) string {
		t.Helper()
		return run("grep -lxs " + name + " /proc/[0-9]*/comm || true")
	}

	active()
	assert.NotContains(t, run("ctr version"), "guest-pull")
	// What ctr specifies by itself needs the cgroup controller of the CPU.
	run(`
mkdir -p /srv/root/proc
cp --parents /bin/sleep $(ldd /bin/sleep | grep -o '/lib[^ ]*') /srv/root
cd /srv
runc spec
sed -i -e 's,"sh"$,"/bin/sleep"\, "10000",' -e 's,"path": "rootfs","path": "/srv/root",' \
	-e 's,"terminal": true,"terminal": false,' -e 's,"linux": {,&"cgroupsPath": "/default/kept"\,,' config.json
ctr run --detach --config /srv/config.json kept
wait_for 'grep -qxs sleep /proc/[0-9]*/comm'`)
	container := processes("sleep")
	runs := func() {
		t.Helper()
		assert.Equal(t, container, processes("sleep"))
		assert.Regexp(t, `kept\s+\d+\s+RUNNING`, run("ctr tasks ls"))
	}
	runs()

	run("apt-get install -y " + deb(t, pkg))
	active()
	assert.Contains(t, run("ctr version"), "+guest-pull.")
	runs()
	// Debian's configuration, of version 2, is in force. Warnings are all right.
	assert.Contains(t, run("containerd guest-pull check"), "\n0 errors, ")

	t.Run("it comes back after a crash", func(t *testing.T) {
		before := daemon()
		run("kill -KILL " + before + "; sleep 1")
		active()
		assert.NotEqual(t, before, daemon())
		runs()
	})

	t.Run("an upgrade restarts it", func(t *testing.T) {
		before := daemon()
		run(`
dpkg-deb -R ` + deb(t, pkg) + ` /root/next
sed -i 's/^Version: .*/Version: 99-1/' /root/next/DEBIAN/control
dpkg-deb --build -Znone /root/next /root/next.deb >/dev/null
apt-get install -y /root/next.deb`)
		active()
		assert.NotEqual(t, before, daemon())
		runs()
	})

	t.Run("it moves to the other line and back", func(t *testing.T) {
		run("ctr namespaces create mine purpose=kept; echo '# a comment of mine' >>" + dropIn)
		for _, to := range []struct{ line, pkg, from string }{{other, otherPkg, pkg}, {line, pkg, otherPkg}} {
			before := daemon()
			run("apt-get install -y " + deb(t, to.pkg))
			active()
			assert.NotEqual(t, before, daemon())
			assert.Contains(t, run("ctr version"), "v"+to.line+".")
			assert.Contains(t, run("readlink /proc/$(systemctl show --property MainPID --value containerd)/exe"), "/usr/bin/containerd\n")
			runs()
			assert.Regexp(t, `mine\s+purpose=kept`, run("ctr namespaces ls"), "the database is the same")
			assert.Contains(t, run("systemctl is-enabled containerd"), "enabled")
			assert.Contains(t, run("containerd guest-pull check"), "\n0 errors, ")
			run("apt-get purge -y " + to.from)
			active()
			runs()
			assert.Contains(t, run("cat "+dropIn), "a comment of mine")
			assert.Contains(t, run("dpkg --verify "+to.pkg+" | grep -v conf.d || echo good"), "good")
		}
		run("ctr namespaces remove mine")
	})

	t.Run("the container ends in order", func(t *testing.T) {
		run("ctr tasks kill --signal SIGKILL kept; wait_for 'ctr tasks ls | grep -q STOPPED'; ctr tasks rm kept; ctr containers rm kept")
		assert.Empty(t, processes("sleep")+processes("containerd-shim"))
	})

	t.Run("removal stops it", func(t *testing.T) {
		run("apt-get remove -y " + pkg)
		assert.Empty(t, processes("containerd"))
		assert.Empty(t, run("systemctl --no-pager --plain --no-legend list-units containerd.service"))
		assert.Empty(t, run("ls /run/containerd/containerd.sock 2>/dev/null || true"))
	})
}

// The packages of the architectures that this machine does not have: their programs
// start, under emulation, which a program that was built for another machine, or
// that needs a loader, does not.
func TestOtherArchitectures(t *testing.T) {
	qemu := map[string]string{"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64le", "s390x": "s390x"}
	for _, arch := range arches(t) {
		if arch == runtime.GOARCH {
			continue
		}
		t.Run(arch, func(t *testing.T) {
			dir := t.TempDir()
			host(t, "tar", "-C", dir, "-xzf", one(t, archive+"-linux-"+arch+".tar.gz"))
			for _, c := range []struct{ args, want string }{
				{"containerd --version", "+guest-pull."},
				{"containerd guest-pull version", "patches:\n  000"},
				{"containerd config default", "[plugins.'" + pluginURI + "']"},
				{"ctr --version", "+guest-pull."},
				{"containerd-shim-runc-v2 -v", "+guest-pull."},
				{"nydus-overlayfs-guest-pull --version", "guest-pull-overlayfs "},
				{"nydus-overlayfs-guest-pull overlay /mnt -f -v -o lowerdir=/a:/b,ro,io.katacontainers.volume=e30=", "overlay mounted on /mnt"},
			} {
				args := strings.Fields(c.args)
				out := host(t, "qemu-"+qemu[arch]+"-static", append([]string{filepath.Join(dir, "bin", args[0])}, args[1:]...)...)
				assert.Contains(t, out, c.want, c.args)
			}
		})
	}
}

// Errors of lintian and rpmlint are errors of the package; their warnings are shown.
func TestLint(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends lintian rpm rpmlint")
	var debs, rpms []string
	for _, arch := range arches(t) {
		debs = append(debs, filepath.Base(one(t, pkg+"_*_"+debArch(arch)+".deb")))
		rpms = append(rpms, filepath.Base(one(t, pkg+"-*."+rpmArch(arch)+".rpm")))
	}
	debs = append(debs, filepath.Base(one(t, pkg+"_*.dsc")))
	rpms = append(rpms, filepath.Base(one(t, pkg+"-*.src.rpm")))
	t.Log(r.run("cd /packages && lintian --allow-root --fail-on error " + strings.Join(debs, " ")))
	config, err := os.ReadFile("rpmlint.toml")
	require.NoError(t, err)
	t.Log(r.run("cat >/root/rpmlint.toml <<'END'\n" + string(config) + "END\ncd /packages && rpmlint --config /root/rpmlint.toml " + strings.Join(rpms, " ")))
}

func TestRPM(t *testing.T) {
	for _, arch := range arches(t) {
		rpm := one(t, pkg+"-*."+rpmArch(arch)+".rpm")
		query := func(args ...string) []string {
			return strings.Split(strings.TrimSpace(host(t, "rpm", append([]string{"-qp"}, append(args, rpm)...)...)), "\n")
		}
		assert.Equal(t, []string{rpmArch(arch)}, query("--qf", "%{ARCH}\n"))
		assert.Subset(t, query("--requires"), []string{"runc", "fuse3"})
		assert.Subset(t, query("--conflicts"), []string{"containerd", "containerd.io"})
		assert.Equal(t, []string{""}, query("--obsoletes"), "an upgrade would replace any containerd")
		assert.Equal(t, []string{dropIn, configFile}, query("-c"))
		// Both packages hold the same programs. The paths in an .rpm's archive are
		// absolute: without the option, cpio would install them on this machine.
		dir := t.TempDir()
		host(t, "sh", "-c", fmt.Sprintf("cd %s && mkdir rpm deb && (cd rpm && rpm2cpio %s | cpio --extract --make-directories --no-absolute-filenames --quiet) && dpkg-deb -x %s deb",
			dir, rpm, one(t, pkg+"_*_"+debArch(arch)+".deb")))
		host(t, "diff", "-r", filepath.Join(dir, "rpm/usr/bin"), filepath.Join(dir, "deb/usr/bin"))
	}
}

// rpm's own database and scriptlets, in a Debian root for want of another one.
// Dependencies cannot be resolved there.
func TestRPMInstall(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends rpm")

	out := r.run("rpm -i --nodeps " + rpm(t, pkg))
	assert.NotContains(t, out, "does not import")
	assert.Contains(t, r.run("containerd --version"), "+guest-pull.")
	r.run("cat >>" + dropIn + " <<'END'" + handler + "END")
	assert.Contains(t, r.handlers(), "kata-test")

	// A configuration that was there first stays; ours goes next to it.
	r.run("rpm -e " + pkg + " && rm -f /etc/containerd/*.rpmsave && echo 'version = 3' >" + configFile)
	out = r.run("rpm -i --nodeps " + rpm(t, pkg))
	assert.Contains(t, out, importLine, "the remedy")
	assert.Equal(t, "version = 3\n", r.run("cat "+configFile))
	assert.Contains(t, r.run("cat "+configFile+".rpmnew"), importLine)

	r.run("rpm -e " + pkg)
	assert.Empty(t, r.run("ls -d /usr/bin/containerd* /usr/bin/*guest-pull* 2>/dev/null || true"))
}

// standIn makes an .rpm of what Debian does not have as one, in /repository. header: more
// lines of its spec.
func (r *root) standIn(name, version, header string) {
	r.t.Helper()
	r.run(`
cat >/tmp/` + name + `.spec <<'END'
Name: ` + name + `
Version: ` + version + `
Release: 1
Summary: test
License: test
` + header + `
%description
test
%files
END
rpmbuild --quiet -bb --define '_rpmdir /repository' --define '_build_name_fmt %%{NAME}-%%{VERSION}.rpm' /tmp/` + name + ".spec 2>/dev/null")
}

// The same with dnf, and a systemd that runs. What Debian does not have as an .rpm is
// made up.
func TestDNF(t *testing.T) {
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends rpm dnf createrepo-c runc fuse3")
	r.run("mkdir /repository")
	for _, name := range []string{"runc", "fuse3", "containerd"} {
		r.standIn(name, "1.7.0", "")
	}
	r.standIn("dash", "1", "Provides: /bin/sh")
	// Docker's, as its package says it.
	r.standIn("containerd.io", "2.2.1", "Provides: containerd, runc\nObsoletes: containerd, runc\nConflicts: containerd, runc")
	run := r.boot()
	run("cp " + rpm(t, pkg) + " " + rpm(t, otherPkg) + ` /repository
createrepo_c --quiet /repository
mkdir -p /etc/yum.repos.d
printf '[test]\nname=test\nbaseurl=file:///repository\ngpgcheck=0\n' >/etc/yum.repos.d/test.repo`)
	installed := func() string {
		return run("rpm -qa --qf '%{NAME}\n' 'containerd*' | sort")
	}
	active := func(line string) {
		t.Helper()
		run("wait_for 'ctr version >/dev/null 2>&1'")
		assert.Contains(t, run("ctr version"), " v"+line+".")
		assert.Equal(t, "enabled\nactive\n", run("systemctl is-enabled containerd; systemctl is-active containerd"))
	}

	// Docker's, which obsoletes it, would be taken for it.
	run("dnf install -y --exclude=containerd.io containerd && dnf upgrade -y --exclude=containerd.io")
	assert.Equal(t, "containerd\n", installed())

	assert.Contains(t, run("dnf install -y "+pkg+" 2>&1 || true"), "--allowerasing", "the way to replace it")
	run("dnf install -y --allowerasing containerd.io && dnf install -y --allowerasing " + pkg + " && dnf upgrade -y")
	assert.Equal(t, pkg+"\n", installed())
	run("dnf install -y --allowerasing containerd.io")
	assert.Equal(t, "containerd.io\n", installed(), "the way back")
	run("dnf install -y --allowerasing " + pkg + " && systemctl enable --now containerd")
	assert.Equal(t, pkg+"\n", installed())
	active(line)

	run("echo '# a comment of mine' | tee -a " + dropIn + " >>" + configFile + "; dnf upgrade -y")
	assert.Equal(t, pkg+"\n", installed())
	for _, to := range []struct{ line, pkg string }{{other, otherPkg}, {line, pkg}} {
		run("dnf install -y --allowerasing " + to.pkg + " && dnf upgrade -y")
		assert.Equal(t, to.pkg+"\n", installed())
		active(to.line)
		for _, f := range []string{dropIn, configFile} {
			assert.Contains(t, run("cat "+f), "a comment of mine", f)
		}
	}
	run("dnf remove -y " + pkg)
	assert.Empty(t, run("ls -d /usr/bin/containerd* /run/containerd/containerd.sock 2>/dev/null || true"))
}

// From the source archive, with Go and make, everything can be built where there is no
// network, no git and no module.
func TestSourceArchive(t *testing.T) {
	dir := t.TempDir()
	source := one(t, archive+".tar.xz")
	host(t, "tar", "-C", dir, "-xf", source)
	script := `
set -e
mkdir "$DIR/path"
printf '#!/bin/sh\necho "$@" >>"$DIR/git.log"; exit 1\n' >"$DIR/path/git"
chmod +x "$DIR/path/git"
export PATH=$DIR/path:$PATH GOPROXY=off GOMODCACHE=$DIR/modules GOTOOLCHAIN=local GOFLAGS=
cd "$DIR/"containerd-guest-pull-*
make build
make install DESTDIR="$DIR/root" PREFIX=/usr
make unit
`
	cmd := exec.Command("unshare", "--net", "sh", "-c", script)
	cmd.Env = append(os.Environ(), "DIR="+dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	assert.NoFileExists(t, filepath.Join(dir, "git.log"))
	assert.NoDirExists(t, filepath.Join(dir, "modules"))

	version := strings.Split(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(source), pkg+"-"), ".tar.xz"), "+guestpull.")
	require.Len(t, version, 2)
	bin := filepath.Join(dir, "root/usr/bin")
	assert.Contains(t, host(t, filepath.Join(bin, "containerd"), "--version"), " v"+version[0]+"+guest-pull."+version[1]+" ")
	assert.Contains(t, host(t, filepath.Join(bin, "containerd"), "guest-pull", "version"), "patches:\n  000")
	assert.Contains(t, host(t, filepath.Join(bin, "guest-pull-overlayfs"), "--version"), version[1])
	for _, p := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		unpacked := t.TempDir()
		host(t, "tar", "-C", unpacked, "-xzf", one(t, archive+"-linux-"+runtime.GOARCH+".tar.gz"))
		host(t, "cmp", filepath.Join(bin, p), filepath.Join(unpacked, "bin", p))
	}
}

// Whoever builds the source packages, without a network, gets the packages that are
// released: the same files, with the same modes, scripts, conffiles and relations.
func TestBuildFromSource(t *testing.T) {
	r := newRoot(t)
	r.gocache = strings.TrimSpace(host(t, "go", "env", "GOCACHE"))
	r.run("apt-get install -y -qq --no-install-recommends build-essential debhelper fakeroot rpm xz-utils")
	if _, err := r.try("apt-get install -y -qq --no-install-recommends golang-1.26-go", false); err != nil {
		// This Debian has no Go that is new enough.
		r.goroot = strings.TrimSpace(host(t, "go", "env", "GOROOT"))
		r.run(`mkdir -p /root/go/DEBIAN
printf 'Package: golang-1.26-go\nVersion: 1.26.99\nArchitecture: all\nMulti-Arch: allowed\nMaintainer: test <test@test.invalid>\nDescription: test\n' >/root/go/DEBIAN/control
dpkg-deb --build /root/go >/dev/null && dpkg -i /root/go.deb`)
	}
	out, err := r.try(`
set -e
export GOCACHE=/var/cache/go PATH=/usr/lib/go-1.26/bin:$PATH
mkdir /build && cd /build
dpkg-source --extract /packages/`+pkg+`_*.dsc source
(cd source && DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage --build=binary --no-sign)
rpmbuild --rebuild --nodeps --nocheck --define '_topdir /build/rpm' /packages/`+pkg+`-*.src.rpm
`, true)
	require.NoError(t, err, out)

	for _, what := range []string{
		// The sizes and dates are those of the programs, which another Go makes.
		`dpkg-deb --contents %s | sed -E 's/ +[0-9]+ [0-9-]+ [0-9:]+ / /' | sort`,
		"dpkg-deb --field %s | grep -v ^Installed-Size:",
		"dpkg-deb --ctrl-tarfile %s | tar --extract --to-stdout ./conffiles ./postinst ./prerm ./postrm ./triggers",
	} {
		released := r.run(fmt.Sprintf(what, deb(t, pkg)))
		require.NotEmpty(t, released, what)
		assert.Equal(t, released, r.run(fmt.Sprintf(what, "/build/"+filepath.Base(deb(t, pkg)))), what)
	}
	for _, what := range []string{
		`rpm -qp --qf '[%%{FILEMODES:perms} %%{FILEFLAGS:fflags} %%{FILENAMES}\n]' %s | sort`,
		"rpm -qp --scripts %s",
		// Which features of rpm it needs depends on the rpm.
		"rpm -qp --provides --requires --conflicts --obsoletes %s | grep -v '^rpmlib(' | sort",
	} {
		released := r.run(fmt.Sprintf(what, rpm(t, pkg)))
		require.NotEmpty(t, released, what)
		assert.Equal(t, released, r.run(fmt.Sprintf(what, "/build/rpm/RPMS/"+rpmArch(runtime.GOARCH)+"/"+filepath.Base(rpm(t, pkg)))), what)
	}
}

// The archive works where it is unpacked, unit and all.
func TestArchive(t *testing.T) {
	r := newRoot(t)
	r.run("tar -C /usr/local -xzf /packages/" + filepath.Base(one(t, archive+"-linux-"+runtime.GOARCH+".tar.gz")))
	assert.Contains(t, r.run("containerd --version"), "+guest-pull.")
	assert.Contains(t, r.run("nydus-overlayfs-guest-pull --version"), "guest-pull-overlayfs ")
	assert.Contains(t, r.run("systemctl cat --root=/ containerd 2>/dev/null || cat /usr/local/lib/systemd/system/containerd.service"), "ExecStart=/usr/local/bin/containerd\n")
	assert.Empty(t, r.run("systemd-analyze verify --man=no --recursive-errors=no /usr/local/lib/systemd/system/containerd.service 2>&1 | grep -F containerd || true"))
}

// SHA256SUMS covers every other file, and no more.
func TestChecksums(t *testing.T) {
	dist := variable(t, "DIST")
	entries, err := os.ReadDir(dist)
	require.NoError(t, err)
	want := map[string]string{}
	for _, e := range entries {
		if e.Name() == "SHA256SUMS" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dist, e.Name()))
		require.NoError(t, err)
		sum := sha256.Sum256(b)
		want[e.Name()] = hex.EncodeToString(sum[:])
	}
	b, err := os.ReadFile(filepath.Join(dist, "SHA256SUMS"))
	require.NoError(t, err)
	got := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		require.Len(t, f, 2)
		got[f[1]] = f[0]
	}
	assert.Equal(t, want, got)
	assert.Len(t, want, 2*(2+3+1+len(arches(t))*(3+4)), "of two lines: the archive and its bill, the two source packages, and what is of an architecture")
}

// The bill of materials of a program lists what is linked into it, at the version
// that is linked. Scanners look for what is known to be wrong with that version of
// containerd, so the patched copy goes by containerd's name; and it says that it is
// patched.
func TestSBOM(t *testing.T) {
	type component struct {
		Name, Version, PURL string
		Pedigree            struct{ Notes string }
	}
	const module = "github.com/containerd/containerd/v2"
	version := strings.TrimSpace(host(t, "go", "list", "-m", "-f", "{{.Version}}", module))
	for _, arch := range arches(t) {
		for _, program := range []string{"containerd", "ctr", "containerd-shim-runc-v2", "guest-pull-overlayfs"} {
			t.Run(arch+"/"+program, func(t *testing.T) {
				b, err := os.ReadFile(one(t, archive+"-linux-"+arch+"."+program+".cdx.json"))
				require.NoError(t, err)
				var bom struct {
					BOMFormat  string
					Metadata   struct{ Component component }
					Components []component
				}
				require.NoError(t, json.Unmarshal(b, &bom))
				assert.Equal(t, "CycloneDX", bom.BOMFormat)
				found := map[string]component{}
				for _, c := range append(bom.Components, bom.Metadata.Component) {
					found[c.Name] = c
					assert.Contains(t, c.PURL, "goarch="+arch)
					assert.NotContains(t, c.Name+c.Version+c.PURL, "devel")
					assert.NotContains(t, c.Name+c.PURL, "./")
				}
				assert.Contains(t, found, "std")
				assert.NotContains(t, found, "github.com/stretchr/testify", "is in no program")
				if program == "guest-pull-overlayfs" {
					return
				}
				c := found[module]
				assert.Equal(t, version, c.Version)
				assert.Contains(t, c.PURL, "pkg:golang/"+module+"@"+version+"?")
				assert.Contains(t, c.Pedigree.Notes, "patched: 000")
			})
		}
	}
}

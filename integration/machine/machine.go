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

package machine

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Options says what a machine is made of.
type Options struct {
	// Root is the directory of a Debian root file system with systemd, an SSH
	// server, a kernel and its initial RAM disk. It is not changed.
	Root string
	// Dir is the directory of the machine's files: its disk, its console. It has to
	// exist.
	Dir string
	// Files are put into the root file system, by their absolute path there.
	Files map[string]File
	// Install is run by a shell in the root file system, when all files are there
	// and before the machine boots. It has no network.
	Install string
	// Forward leads connections to an address of this machine's loopback to a port
	// of the machine's: "127.0.1.1:10250" to 10250.
	Forward []string
	// Reach are ports of this machine's loopback, 127.0.0.1, that the machine has
	// as ports of its own loopback.
	Reach []string
	// Accelerator is QEMU's, as [Accelerator] finds it.
	Accelerator string
}

// File is a file of a machine: a text, or a copy of a file of this machine. Its mode is
// 0644 unless Mode says something else.
type File struct {
	Text, Copy string
	Mode       os.FileMode
}

// Machine is a virtual machine.
type Machine struct {
	o         Options
	disk      *disk
	sshPort   string
	key       ssh.Signer
	hostKey   ssh.PublicKey
	bootLimit time.Duration

	mu     sync.Mutex
	client *ssh.Client
	qemu   *exec.Cmd
	done   chan struct{} // closed when qemu has ended
}

const (
	diskSize = "8G"
	memory   = "3072M"
	half     = "1536M" // of the memory
	cpus     = "2"

	buildLimit = 10 * time.Minute
)

// The machine's own address, and that under which it sees this one.
const (
	address = "10.0.2.15"
	gateway = "10.0.2.2"
)

// Start makes a machine and boots it. The caller has to Close it.
func Start(ctx context.Context, o Options) (_ *Machine, err error) {
	m := &Machine{o: o, bootLimit: 10 * time.Minute}
	if o.Accelerator == "kvm" {
		m.bootLimit = 2 * time.Minute
	}
	if m.sshPort, err = freePort(); err != nil {
		return nil, err
	}
	if err := m.build(ctx); err != nil {
		return nil, err
	}
	if m.disk, err = newDisk(m.path("disk"), m.path("disk.sock")); err != nil {
		return nil, err
	}
	if err := m.Boot(ctx); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Machine) path(name string) string { return filepath.Join(m.o.Dir, name) }

// Console returns the path of what the machine printed on its console, over all
// boots.
func (m *Machine) Console() string { return m.path("console.log") }

// Flushes returns how often the machine has waited for its disk, since it was made.
func (m *Machine) Flushes() int { return m.disk.Flushes() }

// kernel returns the paths of the kernel and of its initial RAM disk.
func kernel(root string) (kernel, initrd string, err error) {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return "", "", err
	}
	if len(kernels) != 1 {
		return "", "", fmt.Errorf("%s has %d kernels, want 1", root, len(kernels))
	}
	_, version, _ := strings.Cut(filepath.Base(kernels[0]), "-")
	return kernels[0], filepath.Join(root, "boot/initrd.img-"+version), nil
}

// Accelerator finds out whether KVM can be used here: a device that is there says
// little, so it starts the kernel of a root file system. It returns the name of
// QEMU's accelerator.
func Accelerator(ctx context.Context, root string) (string, error) {
	image, _, err := kernel(root)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "tcg", nil
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	// Without a disk the kernel panics, and QEMU ends.
	out, err := exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512", "-serial", "stdio",
		"-kernel", image, "-append", "console=ttyS0 panic=-1").CombinedOutput()
	if err == nil && bytes.Contains(out, []byte("Kernel panic")) {
		return "kvm", nil
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", err
	}
	return "tcg", nil
}

const qemu = "qemu-system-x86_64"

// What Debian's kernel is started with, and then what spares an emulated machine work
// that is not looked at: a tenth of the time that it takes to boot.
const kernelArguments = "root=/dev/vda ro console=ttyS0 net.ifnames=0 panic=-1 " +
	"loglevel=4 cryptomgr.notests mitigations=off audit=0 nowatchdog random.trust_cpu=on"

// build makes the disk. The root file system is put together in an overlay, in a
// mount namespace, of which nothing is left whatever happens.
func (m *Machine) build(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	files, err := m.files()
	if err != nil {
		return err
	}
	add := m.path("add")
	for path, f := range files {
		to := filepath.Join(add, path)
		data := []byte(f.Text)
		if f.Copy != "" {
			if data, err = os.ReadFile(f.Copy); err != nil {
				return err
			}
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, cmp.Or(f.Mode, 0o644))); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-ec", `
		mount --make-rprivate /
		mkdir -p "$DIR/o"
		mount -t tmpfs none "$DIR/o"
		mkdir "$DIR/o/upper" "$DIR/o/work" "$DIR/o/merged" "$DIR/o/bare"
		mount -t overlay none -o "lowerdir=$ROOT,upperdir=$DIR/o/upper,workdir=$DIR/o/work" "$DIR/o/merged"
		cd "$DIR/o/merged"
		rm -f etc/resolv.conf
		cp -a "$DIR/add/." .
		chown -R root:root root etc
		mount --bind . "$DIR/o/bare"
		mount -t proc none proc
		chroot . /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
			DEBIAN_FRONTEND=noninteractive LC_ALL=C HOME=/root sh -ec "$INSTALL" </dev/null
		mke2fs -q -t ext4 -m 0 -d "$DIR/o/bare" "$DIR/disk" "$SIZE"
	`)
	cmd.Env = append(os.Environ(), "DIR="+m.o.Dir, "ROOT="+m.o.Root, "INSTALL="+m.o.Install, "SIZE="+diskSize)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make the machine's disk of %s: %w\n%s", m.o.Root, err, out)
	}
	return errors.Join(os.RemoveAll(add), os.RemoveAll(m.path("o")))
}

// files are those that make a machine reach, and be reached.
func (m *Machine) files() (map[string]File, error) {
	files := map[string]File{
		"/etc/fstab":       {Text: "/dev/vda / ext4 defaults 0 1\n"},
		"/etc/hostname":    {Text: "machine\n"},
		"/etc/hosts":       {Text: "127.0.0.1 localhost machine\n"},
		"/etc/resolv.conf": {Text: "nameserver " + gateway + "\n"},
		"/etc/systemd/network/eth0.network": {Text: "[Match]\nName=eth0\n[Network]\nAddress=" + address + "/24\nGateway=" + gateway +
			"\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"},
		"/etc/systemd/journald.conf.d/test.conf": {Text: "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n"},
		// A machine that is emulated takes its time.
		"/etc/systemd/system.conf.d/test.conf": {Text: "[Manager]\nDefaultTimeoutStartSec=15min\n"},
		"/etc/ssh/sshd_config.d/test.conf":     {Text: "HostKey /etc/ssh/test_host_key\nUsePAM no\nUseDNS no\nMaxSessions 100\n"},
	}
	for _, port := range m.o.Reach {
		files["/etc/systemd/system/reach-"+port+".socket"] = File{Text: "[Socket]\nListenStream=127.0.0.1:" + port + "\n[Install]\nWantedBy=sockets.target\n"}
		files["/etc/systemd/system/reach-"+port+".service"] = File{Text: "[Service]\nExecStart=/lib/systemd/systemd-socket-proxyd " + gateway + ":" + port + "\n"}
		m.o.Install = "systemctl --quiet enable reach-" + port + ".socket\n" + m.o.Install
	}
	m.o.Install = "systemctl --quiet enable systemd-networkd.service\n" +
		"systemctl --quiet disable getty@tty1.service systemd-timesyncd.service e2scrub_reap.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer\n" +
		"systemctl --quiet mask systemd-networkd-wait-online.service serial-getty@ttyS0.service\n" + m.o.Install
	maps.Copy(files, m.o.Files)

	_, hostKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(hostKey, "")
	if err != nil {
		return nil, err
	}
	if m.hostKey, err = ssh.NewPublicKey(hostKey.Public()); err != nil {
		return nil, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if m.key, err = ssh.NewSignerFromKey(key); err != nil {
		return nil, err
	}
	files["/etc/ssh/test_host_key"] = File{Text: string(pem.EncodeToMemory(block)), Mode: 0o600}
	files["/root/.ssh/authorized_keys"] = File{Text: string(ssh.MarshalAuthorizedKey(m.key.PublicKey()))}
	return files, nil
}

// Boot switches the machine on, and returns when it can be logged in to and systemd
// has started what there is to start. The machine must be off.
func (m *Machine) Boot(ctx context.Context) error {
	image, initrd, err := kernel(m.o.Root)
	if err != nil {
		return err
	}
	network := []string{"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:" + m.sshPort + "-:22"}
	for _, f := range m.o.Forward {
		network = append(network, "hostfwd=tcp:"+f+"-"+f[strings.LastIndex(f, ":"):])
	}
	cpu := "max"
	accelerator := m.o.Accelerator
	if accelerator == "tcg" {
		accelerator += ",thread=multi"
	}
	cmd := exec.Command(qemu, "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-accel", accelerator, "-cpu", cpu, "-smp", cpus, "-m", memory,
		// Two memory nodes, with a processor each.
		"-object", "memory-backend-ram,id=memory0,size="+half, "-numa", "node,memdev=memory0,cpus=0",
		"-object", "memory-backend-ram,id=memory1,size="+half, "-numa", "node,memdev=memory1,cpus=1",
		"-kernel", image, "-initrd", initrd,
		"-append", kernelArguments,
		"-chardev", "file,id=console,path="+m.Console()+",append=on", "-serial", "chardev:console",
		"-blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+m.path("disk.sock"),
		"-device", "virtio-blk-pci,drive=disk",
		"-netdev", strings.Join(network, ","), "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// Should the test die, the machine goes with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	done := make(chan struct{})
	started := make(chan error)
	go func() {
		// The signal comes when the starting thread ends, so this one stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed; else its standard error says why
			close(done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start the machine: %w", err)
	}
	m.mu.Lock()
	m.qemu, m.done = cmd, done
	m.mu.Unlock()
	if err := m.up(ctx); err != nil {
		select {
		case <-done:
			err = fmt.Errorf("%w; QEMU has ended: %s", err, &stderr)
		default:
		}
		return err
	}
	return nil
}

// up waits until the machine has booted.
func (m *Machine) up(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, m.bootLimit)
	defer cancel()
	for {
		_, err := m.login(ctx)
		if err == nil {
			break
		}
		select {
		case <-m.done:
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
			continue
		}
		return fmt.Errorf("the machine cannot be logged in to after it was switched on: %w; its console is in %s", err, m.Console())
	}
	// "degraded" is for who looks at single units.
	if _, err := m.Run(ctx, "systemctl is-system-running --wait || true"); err != nil {
		return fmt.Errorf("wait for the machine's systemd: %w", err)
	}
	return nil
}

// login returns the SSH connection to the machine, a new one if there is none.
func (m *Machine) login(ctx context.Context) (*ssh.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client != nil {
		return m.client, nil
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", "127.0.0.1:"+m.sshPort)
	if err != nil {
		return nil, err
	}
	// QEMU accepts the connection before there is somebody to answer it.
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	c, channels, requests, err := ssh.NewClientConn(conn, "machine", &ssh.ClientConfig{
		User:              "root",
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(m.key)},
		HostKeyCallback:   ssh.FixedHostKey(m.hostKey),
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
	})
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	client := ssh.NewClient(c, channels, requests)
	m.client = client
	go func() {
		_ = client.Wait()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.client == client {
			m.client = nil
		}
	}()
	return client, nil
}

func (m *Machine) logout() {
	m.mu.Lock()
	client := m.client
	m.client = nil
	m.mu.Unlock()
	if client != nil {
		client.Close()
	}
}

// Run runs a script with sh in the machine, as root, and returns what it printed. A
// script that fails is an error that has what it printed. After ctx is done the
// script may still run.
func (m *Machine) Run(ctx context.Context, script string) (string, error) {
	client, err := m.login(ctx)
	if err != nil {
		return "", fmt.Errorf("log in to the machine: %w", err)
	}
	session, err := client.NewSession()
	if err != nil {
		return "", fmt.Errorf("log in to the machine: %w", err)
	}
	defer session.Close()
	stop := context.AfterFunc(ctx, func() { session.Close() })
	defer stop()
	var stdout, stderr bytes.Buffer
	session.Stdin = strings.NewReader("set -e\n" + script)
	session.Stdout, session.Stderr = &stdout, &stderr
	err = session.Run("sh")
	if ctx.Err() != nil {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		err = fmt.Errorf("in the machine: %s: %w\n%s%s", script, err, &stdout, &stderr)
	}
	return stdout.String(), err
}

// Dial connects to a socket in the machine: "unix" and a path, or "tcp".
func (m *Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	client, err := m.login(ctx)
	if err != nil {
		return nil, err
	}
	return client.DialContext(ctx, network, address)
}

// Reboot asks systemd for a reboot, and returns when the machine has booted again.
func (m *Machine) Reboot(ctx context.Context) error {
	const id = "cat /proc/sys/kernel/random/boot_id"
	before, err := m.Run(ctx, id)
	if err != nil {
		return err
	}
	if _, err := m.Run(ctx, "systemctl --no-block reboot"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, m.bootLimit)
	defer cancel()
	for {
		try, cancelTry := context.WithTimeout(ctx, 10*time.Second)
		after, err := m.Run(try, id)
		cancelTry()
		if err == nil && after != before {
			return m.up(ctx)
		}
		if err != nil {
			m.logout()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the machine has not booted again (%w); its console is in %s", err, m.Console())
		case <-time.After(time.Second):
		}
	}
}

// Most of the time nothing is written, or what was is flushed at once. So a cut waits
// until a random number of blocks, up to unflushed, is in the disk's cache, but not longer
// than fillLimit.
const (
	unflushed = 128
	fillLimit = 15 * time.Second
)

// Cut takes the machine's power away, while it writes if it does: it ends, and of what it
// had written to its disk and not flushed, each block is there or is not. It returns how
// many blocks there were, and how many are lost. [Machine.Boot] switches it on again.
func (m *Machine) Cut(random *mathrand.Rand) (written, lost int, err error) {
	// Small numbers are as likely as large ones.
	blocks := int(math.Pow(unflushed, random.Float64()))
	select {
	case <-m.disk.fill(blocks):
	case <-time.After(fillLimit):
	}
	if err := m.kill(); err != nil {
		return 0, 0, err
	}
	return m.disk.cut(random)
}

// Inspect calls f with the root file system of a machine that is off, mounted as the
// machine would mount it when it boots. The mount is in a mount namespace of its own:
// one that another process took a copy of would still be there when the machine has
// booted. So f must not look at files in other goroutines.
func (m *Machine) Inspect(f func(root string) error) error {
	dir := m.path("root")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		// Not unlocked: the thread ends with the goroutine, and the namespace with it.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("make a mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("keep a mount to itself: %w", err)
			}
			// This replays the journal.
			if out, err := exec.Command("mount", "-o", "loop", m.path("disk"), dir).CombinedOutput(); err != nil {
				return fmt.Errorf("mount the machine's disk: %w: %s", err, out)
			}
			return errors.Join(f(dir), unix.Unmount(dir, 0))
		}()
	}()
	return <-done
}

func (m *Machine) kill() error {
	m.logout()
	if m.qemu == nil {
		return nil
	}
	if err := m.qemu.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-m.done
	m.qemu = nil
	return nil
}

// Close ends the machine. Its files stay.
func (m *Machine) Close() error { return errors.Join(m.kill(), m.disk.close()) }

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

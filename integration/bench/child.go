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
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
)

// childEnv makes this program one of its own children.
const childEnv = "GUEST_PULL_BENCH_CHILD"

// The children.
const (
	serveChild  = "serve"  // a proxy snapshotter's daemon
	sealedChild = "sealed" // prepares layers where nothing can be written
)

// runChild does a child's work in a process that was started as one, and returns
// false in any other.
func runChild() bool {
	var err error
	switch os.Getenv(childEnv) {
	case serveChild:
		err = serve(os.Args[1], os.Args[2])
	case sealedChild:
		err = sealed(os.Args[1])
	default:
		return false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// child prepares a command that runs this program as a child. It ends with the
// thread that starts it, so the caller locks its goroutine to its thread.
func child(what string, args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), childEnv+"="+what)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, nil
}

// daemon is the guest-pull snapshotter as the older design has it: a process of
// its own behind a socket, here with nothing else in it.
type daemon struct {
	cmd    *exec.Cmd
	socket string
	done   chan error
}

func startDaemon(dir string) (*daemon, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// One that was killed leaves its socket.
	if err := os.RemoveAll(filepath.Join(dir, "proxy.sock")); err != nil {
		return nil, err
	}
	d := &daemon{socket: filepath.Join(dir, "proxy.sock"), done: make(chan error, 1)}
	cmd, err := child(serveChild, filepath.Join(dir, "root"), d.socket)
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	d.cmd = cmd
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // see child
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			d.done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	for range 500 {
		if conn, err := net.Dial("unix", d.socket); err == nil {
			return d, conn.Close()
		}
		select {
		case err := <-d.done:
			return nil, fmt.Errorf("the proxy's daemon ended: %w: %s", err, stderr.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil, errors.Join(errors.New("the proxy's daemon does not listen"), d.stop())
}

// stop ends the daemon. There may be none.
func (d *daemon) stop() error {
	if d == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return <-d.done
}

// connect returns the snapshotter as containerd has it through the socket
// (containerd, plugins/... proxy_plugins: the same client).
func (d *daemon) connect() (snapshots.Snapshotter, error) {
	conn, err := grpc.NewClient("unix://"+d.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return connected{proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), guestPull), conn}, nil
}

type connected struct {
	snapshots.Snapshotter
	conn *grpc.ClientConn
}

func (c connected) Close() error { return c.conn.Close() }

func serve(root, socket string) error {
	s, err := snapshotter.New(context.Background(), root, snapshotter.Config{})
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	return errors.Join(server.Serve(l), s.Close())
}

// prepareSealed prepares layers in a process in which every system call that
// writes to a file, makes a file or flushes one fails.
func prepareSealed(root string) error {
	cmd, err := child(sealedChild, root)
	if err != nil {
		return err
	}
	runtime.LockOSThread() // see child
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("preparing layers where nothing can be written: %w: %s", err, out)
	}
	return nil
}

// sealedLayers is how many layers are prepared without a write.
const sealedLayers = 1000

func sealed(root string) error {
	ctx := namespace(context.Background())
	s, err := snapshotter.New(ctx, root, snapshotter.Config{})
	if err != nil {
		return err
	}
	if err := sealFiles(); err != nil {
		return fmt.Errorf("forbid writes: %w", err)
	}
	asked := metadataCalls{s}
	for n := range sealedLayers / layersPerImage {
		if err := asked.prepare(ctx, newImage(fmt.Sprintf("sealed-%d", n), layersPerImage)); err != nil {
			return err
		}
	}
	// That the seal holds is seen from what has to write.
	if _, err := s.Prepare(ctx, "k8s.io/1/container", newImage("sealed", 1).top()); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("a container was prepared, or failed for another reason than that nothing can be written: %w", err)
	}
	return nil
}

// metadataCalls makes the calls to a backend that the metadata store makes for
// each layer (containerd, core/metadata/snapshot.go), without the store.
type metadataCalls struct{ snapshots.Snapshotter }

func (m metadataCalls) prepare(ctx context.Context, i image) error {
	for l, chainID := range i.chain {
		key := "k8s.io/1/" + fmt.Sprintf(snapshots.UnpackKeyFormat, "bench", chainID)
		if _, err := m.Prepare(ctx, key, i.parent(l), snapshots.WithLabels(i.labels[l])); !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("prepare layer %d: %w", l, err)
		}
		found := 0
		err := m.Walk(ctx, func(context.Context, snapshots.Info) error {
			found++
			return nil
		}, fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, chainID, i.parent(l)))
		if err != nil || found != 1 {
			return fmt.Errorf("look for layer %d: found %d: %w", l, found, err)
		}
		if _, err := m.Stat(ctx, chainID); err != nil {
			return fmt.Errorf("stat layer %d: %w", l, err)
		}
	}
	return nil
}

// writers are the system calls that change or flush files. "write" itself is not
// among them, as Go's runtime needs it to wake its threads. It is no way around:
// bbolt writes with pwrite64, and no new file can be opened.
var writers = []uint32{
	unix.SYS_PWRITE64, unix.SYS_PWRITEV, unix.SYS_PWRITEV2, unix.SYS_WRITEV,
	unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNC, unix.SYS_SYNCFS, unix.SYS_SYNC_FILE_RANGE, unix.SYS_MSYNC,
	unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_COPY_FILE_RANGE,
	unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT,
	unix.SYS_FCHMODAT, unix.SYS_FCHOWNAT,
}

// sealFiles makes the writers fail with EROFS, for good and in all threads of
// this process (seccomp(2)).
func sealFiles() error {
	const ( // in struct seccomp_data
		number      = 0
		openatFlags = 16 + 2*8 // the low half, on little-endian machines
	)
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	program := []unix.SockFilter{load(number)}
	for i, nr := range writers {
		// To the last instruction.
		program = append(program, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jt: uint8(len(writers) - i + 3)})
	}
	program = append(program,
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jf: 2},
		load(openatFlags),
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.O_CREAT, Jt: 1},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EROFS)},
	)
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return errno
	}
	return nil
}

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

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// Node is a running containerd and what belongs to it.
type Node struct {
	// Runtime and Images are the CRI services, as kubelet has them.
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient
	// Client is containerd's own client. It has no default namespace; CRI's
	// is CRINamespace.
	Client *containerd.Client

	paths
	bin     binaries
	patches []string
	opts    Options
	id      string // marks processes and names cgroups
	conn    *grpc.ClientConn
	process *process
}

// CRINamespace is the containerd namespace that CRI works in.
const CRINamespace = "k8s.io"

// markEnv is in the environment of containerd and of its shims.
const markEnv = "GUEST_PULL_TEST_NODE"

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 60 * time.Second
)

// Start makes a node and starts its containerd. It returns when containerd
// serves CRI. The caller has to Close the node.
func Start(ctx context.Context, o Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a containerd node needs root: it mounts file systems and runs containers")
	}
	bin, err := findBinaries(o)
	if err != nil {
		return nil, err
	}
	if o.Registry != nil && o.PauseImage == "" {
		if o.PauseImage, err = PushPause(o.Registry); err != nil {
			return nil, err
		}
	}
	patches, err := bin.patches(ctx)
	if err != nil {
		return nil, err
	}
	if o.Sandboxer == "" {
		o.Sandboxer = os.Getenv("GUEST_SANDBOXER")
	}
	if o.PullHint == HintAuto {
		o.PullHint = HintImageSpec
		if len(patches) > 0 {
			o.PullHint = HintNone
		}
	}
	dir, err := os.MkdirTemp("", "gp-")
	if err != nil {
		return nil, err
	}
	n := &Node{paths: paths{dir}, bin: bin, patches: patches, opts: o, id: filepath.Base(dir)}
	if err := errors.Join(os.Mkdir(n.shims(), 0o700), writeConfig(n.paths, bin, o)); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err = n.connect("unix://"+n.socket(), time.Second); err == nil {
		err = n.Up(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// connect makes the clients. They dial when they are first used, and again after each
// restart.
func (n *Node) connect(target string, timeout time.Duration, o ...grpc.DialOption) (err error) {
	n.conn, err = grpc.NewClient(target, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16 << 20)),
		// A test that restarts containerd must not wait for a back-off that
		// grew while it was down.
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: timeout}),
	}, o...)...)
	if err != nil {
		return err
	}
	n.Runtime = runtimeapi.NewRuntimeServiceClient(n.conn)
	n.Images = runtimeapi.NewImageServiceClient(n.conn)
	n.Client, err = containerd.NewWithConn(n.conn)
	return err
}

// Remote returns a node whose containerd somebody else runs, on another machine, and
// that is reached through dial. Of its methods those work that ask containerd, and
// Disconnect.
func Remote(dial func(context.Context) (net.Conn, error)) (*Node, error) {
	n := &Node{}
	return n, n.connect("passthrough:///containerd", 30*time.Second,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
}

// Disconnect ends the connection to a Remote node.
func (n *Node) Disconnect() error { return n.conn.Close() }

// PushPause puts an image for sandboxes into a registry, as pause:1, and returns its
// reference.
func PushPause(r *registry.Registry) (string, error) {
	pause, err := images.Pause()
	if err != nil {
		return "", err
	}
	return r.Push("pause:1", pause)
}

// Dir returns the directory that holds everything of the node.
func (n *Node) Dir() string { return n.dir }

// Root returns containerd's root directory.
func (n *Node) Root() string { return n.root() }

// State returns containerd's state directory.
func (n *Node) State() string { return n.state() }

// Socket returns the path of containerd's socket.
func (n *Node) Socket() string { return n.socket() }

// SnapshotterRoot returns the directory of a snapshotter.
func (n *Node) SnapshotterRoot(name string) string {
	return filepath.Join(n.root(), "io.containerd.snapshotter.v1."+name)
}

// LogFile returns the path of what containerd and its shims wrote to their
// logs, over all restarts.
func (n *Node) LogFile() string { return n.log() }

// CgroupParent returns the cgroup below which CRI puts the node's pods. Its
// name is the same in every hierarchy.
func (n *Node) CgroupParent() string { return "/" + n.id }

// StandIn says whether the handler Guest is the stand-in guest, and not a real
// runtime that RUNTIME names.
func (n *Node) StandIn() bool { return n.bin.runtimeType == StandIn }

// RuntimeType returns the runtime type of the handler Guest, as ctr's --runtime
// takes it.
func (n *Node) RuntimeType() string { return n.bin.runtimeType }

// Patches names the patches to containerd that are built into the node's.
func (n *Node) Patches() []string { return n.patches }

// Pid returns the process ID of containerd, or 0 when it is not running.
func (n *Node) Pid() int {
	if n.process == nil {
		return 0
	}
	return n.process.cmd.Process.Pid
}

// env is the environment of containerd and ctr.
func (n *Node) env() []string {
	path := []string{n.bin.dir}
	if n.bin.shim != "" {
		path = append(path, filepath.Dir(n.bin.shim))
	}
	// mount.fuse and runc are in sbin, which an unprivileged user's PATH
	// does not have.
	path = append(path, os.Getenv("PATH"), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	env := []string{
		"PATH=" + strings.Join(path, ":"),
		"HOME=" + n.dir,
		"TMPDIR=" + os.TempDir(),
		markEnv + "=" + n.id,
		guest.ConfigEnv + "=" + n.guestConf(),
		"GORACE=exitcode=0", // a report is in the log, for dataRaces
	}
	for _, k := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return append(env, n.opts.Env...)
}

// process is a containerd and the news of its end.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is set then
	err  error
}

// Launch starts containerd after Down or Kill, on what it left, and does not wait until
// it serves anything.
func (n *Node) Launch() error {
	if n.process != nil {
		return errors.New("containerd is running already")
	}
	logFile, err := os.OpenFile(n.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(filepath.Join(n.bin.dir, "containerd"), "--config", n.config())
	cmd.Env = n.env()
	cmd.Dir = n.dir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// In a process group of its own, containerd does not get the Ctrl-C that
	// is meant for the test. Should the test die, containerd goes with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, done: make(chan struct{})}

	started := make(chan error)
	go func() {
		// The signal comes when the starting thread ends, so this one stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	n.process = p
	return nil
}

// Ended returns nil while the containerd that Launch started runs, and then why it ended.
func (n *Node) Ended() error {
	select {
	case <-n.process.done:
		return fmt.Errorf("containerd ended while it was starting: %s", n.process.cmd.ProcessState)
	default:
		return nil
	}
}

// Up starts containerd after Down or Kill, on what it left, and returns when it
// serves CRI.
func (n *Node) Up(ctx context.Context) error {
	if err := n.Launch(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		n.conn.ResetConnectBackoff()
		status, err := n.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
		if err == nil {
			for _, c := range status.GetStatus().GetConditions() {
				// The other condition is the network, which needs a CNI.
				if c.Type == runtimeapi.RuntimeReady && c.Status {
					return nil
				}
			}
			err = fmt.Errorf("runtime not ready: %v", status.GetStatus().GetConditions())
		}
		// The server does not run before all plugins are there or have failed.
		if grpcstatus.Code(err) == codes.Unimplemented {
			return fmt.Errorf("containerd runs without CRI, as a plugin that it needs did not start: %w\n%s", err, n.LogTail(30))
		}
		select {
		case <-n.process.done:
			err := fmt.Errorf("%w\n%s", n.Ended(), n.LogTail(30))
			n.process = nil
			return err
		case <-ctx.Done():
			return fmt.Errorf("containerd does not serve CRI: %w\n%s", err, n.LogTail(30))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Down stops containerd with SIGTERM and waits for its end. Containers keep
// running.
func (n *Node) Down() error { return n.signal(syscall.SIGTERM) }

// Kill kills containerd with SIGKILL. Containers keep running.
func (n *Node) Kill() error { return n.signal(syscall.SIGKILL) }

// Signal sends containerd a signal that ends it, and waits for its end.
func (n *Node) Signal(s syscall.Signal) error { return n.signal(s) }

func (n *Node) signal(s syscall.Signal) error {
	p := n.process
	if p == nil {
		return errors.New("containerd is not running")
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		p.cmd.Process.Kill() // reported as a whole
		<-p.done
		n.process = nil
		return fmt.Errorf("containerd had not ended %s after %s and was killed", stopTimeout, s)
	}
	n.process = nil
	if s != syscall.SIGKILL && p.err != nil {
		return fmt.Errorf("containerd after %s: %w", s, p.err)
	}
	return nil
}

// LogTail returns the last lines of the log.
func (n *Node) LogTail(lines int) string {
	b, err := os.ReadFile(n.log())
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// Ctr runs ctr against the node and returns what it printed. The namespace is
// ctr's own default unless args begin with another.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(n.bin.dir, "ctr"), append([]string{"--address", n.socket()}, args...)...)
	cmd.Env = n.env()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Close ends everything that the node started, by force where that is needed,
// and removes its directory.
func (n *Node) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	if n.process != nil {
		n.removePods(ctx)       // what stays is ended below
		n.removeContainers(ctx) // likewise
		errs = append(errs, n.Down())
	}
	if n.Client != nil {
		n.Client.Close()
	}
	if n.conn != nil {
		n.conn.Close()
	}
	errs = append(errs, n.killProcesses(ctx), n.unmountAll(), n.removeCgroups(ctx))
	if os.Getenv("GUEST_PULL_KEEP") != "" {
		fmt.Fprintf(os.Stderr, "GUEST_PULL_KEEP: the node's files are in %s\n", n.dir)
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, os.RemoveAll(n.dir))...)
}

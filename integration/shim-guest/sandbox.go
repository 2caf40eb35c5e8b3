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
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	runc "github.com/containerd/go-runc"

	sandboxAPI "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// sandbox serves containerd's sandbox API as Kata's Rust shim does
// (src/runtime-rs/crates/service/src/sandbox_service.rs and
// src/runtime-rs/crates/runtimes/virt_container/src/sandbox.rs): the sandbox is a
// virtual machine, with no pause container and no image in it, and its process is
// the shim. Here the machine is a process that holds the namespaces of the pod.
// What the Rust shim does not serve is not served.
type sandbox struct {
	shutdown shutdown.Service
	// kill kills every container of the pod.
	kill func(context.Context)

	mu       sync.Mutex
	id       string // "" before CreateSandbox
	ns       string
	netns    string
	cfg      guest.Config
	created  time.Time
	machine  int // its process; 0 while there is none
	alive    *os.File
	stopped  chan struct{}
	exitedAt time.Time
}

func newSandbox(ss shutdown.Service, kill func(context.Context)) *sandbox {
	return &sandbox{shutdown: ss, kill: kill, stopped: make(chan struct{})}
}

// The type of what containerd's CRI gives to CreateSandbox, as the Rust shim wants
// it (src/runtime-rs/crates/runtimes/common/src/types/trans_from_shim.rs).
const podSandboxConfig = "runtime.v1.PodSandboxConfig"

func (s *sandbox) RegisterTTRPC(server *ttrpc.Server) error {
	server.RegisterService("containerd.runtime.sandbox.v1.Sandbox", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   method(s.create),
		"StartSandbox":    method(s.start),
		"Platform":        method(s.platform),
		"StopSandbox":     method(s.stop),
		"WaitSandbox":     method(s.wait),
		"SandboxStatus":   method(s.status),
		"PingSandbox":     method(s.ping),
		"ShutdownSandbox": method(s.end),
		"SandboxMetrics": method(func(context.Context, *sandboxAPI.SandboxMetricsRequest) (*sandboxAPI.SandboxMetricsResponse, error) {
			return nil, fmt.Errorf("/containerd.runtime.sandbox.v1.Sandbox/SandboxMetrics is not supported: %w", errdefs.ErrNotFound)
		}),
	}})
	return nil
}

func method[Q, R any](f func(context.Context, *Q) (*R, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var q Q
		if err := unmarshal(&q); err != nil {
			return nil, err
		}
		r, err := f(ctx, &q)
		return r, errgrpc.ToGRPC(err)
	}
}

// create makes a sandbox, but no machine yet. It is configured by what the
// environment names alone: runtime options come with containers.
func (s *sandbox) create(ctx context.Context, r *sandboxAPI.CreateSandboxRequest) (*sandboxAPI.CreateSandboxResponse, error) {
	cfg, err := guest.LoadConfig(os.Getenv(guest.ConfigEnv))
	if err != nil {
		return nil, err
	}
	if cfg.Flavour == guest.FlavourGo {
		return nil, fmt.Errorf("stand-in guest: Kata's Go shim does not have the sandbox API (sandboxer = \"shim\"): %w", errdefs.ErrNotImplemented)
	}
	if t := r.GetOptions().GetTypeUrl(); t != podSandboxConfig {
		return nil, fmt.Errorf("stand-in guest: sandbox options of type %q, want %q: %w", t, podSandboxConfig, errdefs.ErrInvalidArgument)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id != "" {
		return nil, fmt.Errorf("sandbox %s: %w", s.id, errdefs.ErrAlreadyExists)
	}
	s.id, s.ns, s.netns, s.cfg = r.SandboxID, ns, r.NetnsPath, cfg
	return &sandboxAPI.CreateSandboxResponse{}, nil
}

func (s *sandbox) start(ctx context.Context, r *sandboxAPI.StartSandboxRequest) (*sandboxAPI.StartSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id == "" || s.machine != 0 {
		return nil, fmt.Errorf("sandbox %q is not there or was started before: %w", r.SandboxID, errdefs.ErrFailedPrecondition)
	}
	cmd, exits, alive, err := startMachine(s.netns)
	if err != nil {
		return nil, fmt.Errorf("stand-in guest: start the machine of sandbox %s: %w", s.id, err)
	}
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	s.machine, s.alive, s.created = cmd.Process.Pid, alive, time.Now()
	go s.watch(context.WithoutCancel(ctx), cmd, exits)
	record := guest.Record{
		Namespace: s.ns, ID: s.id, SandboxID: s.id, Sandbox: true, SandboxAPI: true, Flavour: s.cfg.Flavour,
		ShimPID: os.Getpid(), MountNamespace: ns, MachinePID: s.machine,
	}
	if err := record.Write(s.cfg.RecordDir); err != nil {
		log.G(ctx).WithError(err).WithField("id", s.id).Error("the record of a sandbox is missing")
	}
	return &sandboxAPI.StartSandboxResponse{Pid: uint32(os.Getpid()), CreatedAt: protobuf.ToTimestamp(s.created)}, nil
}

// watch waits for the end of the machine, with which its containers end.
func (s *sandbox) watch(ctx context.Context, machine *exec.Cmd, exits chan runc.Exit) {
	if _, err := reaper.Default.Wait(machine, exits); err != nil {
		log.G(ctx).WithError(err).Error("the machine of the sandbox is lost")
	}
	s.kill(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exitedAt = time.Now()
	close(s.stopped)
}

func (s *sandbox) platform(context.Context, *sandboxAPI.PlatformRequest) (*sandboxAPI.PlatformResponse, error) {
	return &sandboxAPI.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

func (s *sandbox) stop(ctx context.Context, _ *sandboxAPI.StopSandboxRequest) (*sandboxAPI.StopSandboxResponse, error) {
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	if machine == 0 {
		return &sandboxAPI.StopSandboxResponse{}, nil
	}
	select {
	case <-s.stopped:
		return &sandboxAPI.StopSandboxResponse{}, nil
	default:
	}
	if err := syscall.Kill(machine, syscall.SIGKILL); err != nil {
		return nil, fmt.Errorf("stand-in guest: stop the machine: %w", err)
	}
	select {
	case <-s.stopped:
		return &sandboxAPI.StopSandboxResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *sandbox) wait(ctx context.Context, _ *sandboxAPI.WaitSandboxRequest) (*sandboxAPI.WaitSandboxResponse, error) {
	select {
	case <-s.stopped:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &sandboxAPI.WaitSandboxResponse{ExitedAt: protobuf.ToTimestamp(s.exitedAt)}, nil
}

func (s *sandbox) status(context.Context, *sandboxAPI.SandboxStatusRequest) (*sandboxAPI.SandboxStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := "SANDBOX_NOTREADY"
	if s.running() {
		state = "SANDBOX_READY"
	}
	return &sandboxAPI.SandboxStatusResponse{
		SandboxID: s.id, Pid: uint32(os.Getpid()), State: state, CreatedAt: protobuf.ToTimestamp(s.created),
	}, nil
}

func (s *sandbox) running() bool {
	select {
	case <-s.stopped:
		return false
	default:
		return s.machine != 0
	}
}

func (s *sandbox) ping(context.Context, *sandboxAPI.PingRequest) (*sandboxAPI.PingResponse, error) {
	return &sandboxAPI.PingResponse{}, nil
}

func (s *sandbox) end(ctx context.Context, _ *sandboxAPI.ShutdownSandboxRequest) (*sandboxAPI.ShutdownSandboxResponse, error) {
	if _, err := s.stop(ctx, nil); err != nil {
		return nil, err
	}
	// The shim library finds its sockets by the bundle, which containerd removes
	// once it has the answer; and the answer has to leave first.
	for _, debug := range []bool{false, true} {
		if address, err := socketAddress(ctx, s.id, debug); err == nil {
			_ = shim.RemoveSocket(address) // there may be none for debugging
		}
	}
	time.AfterFunc(100*time.Millisecond, s.shutdown.Shutdown)
	return &sandboxAPI.ShutdownSandboxResponse{}, nil
}

// own returns the sandbox's ID, "" without the sandbox API, its configuration and
// the process of its machine.
func (s *sandbox) own() (id string, cfg guest.Config, machine int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id, s.cfg, s.machine
}

// startMachine starts the process that holds the pod's namespaces. It ends when the
// file is closed, and so with the shim.
func startMachine(netns string) (*exec.Cmd, chan runc.Exit, *os.File, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	defer r.Close()
	cmd := exec.Command(self)
	cmd.Args[0] = machineName
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID}
	var exits chan runc.Exit
	err = inNetwork(netns, func() (err error) {
		exits, err = reaper.Default.Start(cmd)
		return err
	})
	if err != nil {
		w.Close()
		return nil, nil, nil, err
	}
	return cmd, exits, w, nil
}

// inNetwork calls f in a network namespace, or where it is when path is "".
func inNetwork(path string, f func() error) error {
	if path == "" {
		return f()
	}
	runtime.LockOSThread()
	before, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		return err
	}
	defer before.Close()
	there, err := os.Open(path)
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	ferr := f()
	// A thread that cannot go back ends with its goroutine.
	if err := unix.Setns(int(before.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("leave %s: %w", path, err)
	}
	runtime.UnlockOSThread()
	return ferr
}

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
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Hint is how a pull tells containerd for which runtime handler it is, which
// decides the snapshotter.
type Hint int

const (
	// HintAuto is HintNone for a containerd with this project's patches, and
	// HintImageSpec for one without, which would pull on the host otherwise.
	HintAuto Hint = iota
	// HintNone sends the pod's sandbox config and nothing about a handler, as
	// kubelet does by default.
	HintNone
	// HintImageSpec sends the handler in the request's ImageSpec, as kubelet
	// does with the feature gate RuntimeClassInImageCriApi.
	HintImageSpec
	// HintAnnotation sends the handler as an annotation of the sandbox
	// config, which stock containerd understands and has deprecated.
	HintAnnotation
)

// handlerAnnotation is containerd's (internal/cri/annotations).
const handlerAnnotation = "io.containerd.cri.runtime-handler"

// PodSpec is what a test says of a pod. The zero value is a pod for the default
// handler.
type PodSpec struct {
	// Name is unique to the pod when it is "".
	Name string
	// Namespace is the Kubernetes namespace; "" means "default".
	Namespace string
	// Handler is the runtime handler: Guest, Runc, or "" for the default.
	Handler string
	// Annotations are the pod's own. What kubelet adds is added.
	Annotations map[string]string
}

// Pod is a running pod sandbox.
type Pod struct {
	ID      string
	Handler string
	// Config is what every later call about the pod carries.
	Config *runtimeapi.PodSandboxConfig

	node *Node
}

var serial atomic.Int64

// PodConfig returns the sandbox config that kubelet makes of a pod: on the host's
// network, or where that cannot be (see Options.Sandboxer) on its own.
func (n *Node) PodConfig(s PodSpec) *runtimeapi.PodSandboxConfig {
	id := serial.Add(1)
	if s.Name == "" {
		s.Name = fmt.Sprintf("pod-%d", id)
	}
	if s.Namespace == "" {
		s.Namespace = "default"
	}
	uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", id)
	annotations := map[string]string{
		"kubernetes.io/config.seen":   time.Now().Format(time.RFC3339Nano),
		"kubernetes.io/config.source": "api",
	}
	maps.Copy(annotations, s.Annotations)
	network := runtimeapi.NamespaceMode_NODE
	if n.opts.Sandboxer == SandboxerShim && s.Handler == Guest {
		network = runtimeapi.NamespaceMode_POD
	}
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: s.Name, Namespace: s.Namespace, Uid: uid},
		LogDirectory: filepath.Join(n.logs(), s.Namespace+"_"+s.Name+"_"+uid),
		DnsConfig:    &runtimeapi.DNSConfig{},
		Labels: map[string]string{
			"io.kubernetes.pod.name":      s.Name,
			"io.kubernetes.pod.namespace": s.Namespace,
			"io.kubernetes.pod.uid":       uid,
		},
		Annotations: annotations,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: n.CgroupParent() + "/pod" + uid,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{
					Network: network,
					Pid:     runtimeapi.NamespaceMode_CONTAINER,
					Ipc:     runtimeapi.NamespaceMode_POD,
				},
				Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			},
		},
	}
}

// RunPod runs a pod sandbox.
func (n *Node) RunPod(ctx context.Context, s PodSpec) (*Pod, error) {
	p := &Pod{Handler: s.Handler, Config: n.PodConfig(s), node: n}
	if err := os.MkdirAll(p.Config.LogDirectory, 0o755); err != nil {
		return nil, err
	}
	r, err := n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.Config, RuntimeHandler: s.Handler})
	if err != nil {
		return nil, fmt.Errorf("RunPodSandbox: %w", err)
	}
	p.ID = r.GetPodSandboxId()
	return p, nil
}

// Stop stops the pod and its containers.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.node.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
	return wrap("StopPodSandbox", err)
}

// Remove stops the pod and removes it and its containers.
func (p *Pod) Remove(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	_, err := p.node.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return wrap("RemovePodSandbox", err)
}

// Status returns the pod's state.
func (p *Pod) Status(ctx context.Context) (*runtimeapi.PodSandboxStatus, error) {
	r, err := p.node.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID})
	return r.GetStatus(), wrap("PodSandboxStatus", err)
}

// PullSpec is what a test says of a pull.
type PullSpec struct {
	Image string
	Auth  *runtimeapi.AuthConfig
	// Handler is named in the request in the way that Hint says; HintAuto is
	// that of the node's options.
	Handler string
	Hint    Hint
	// Pod is the config of the pod that the pull is for; nil sends none.
	Pod *runtimeapi.PodSandboxConfig
	// Annotations go into the ImageSpec. Kubelet puts the pod's there.
	Annotations map[string]string
}

// Pull pulls an image over CRI and returns its reference, the image ID.
func (n *Node) Pull(ctx context.Context, s PullSpec) (string, error) {
	req := &runtimeapi.PullImageRequest{
		Image:         &runtimeapi.ImageSpec{Image: s.Image, Annotations: s.Annotations},
		Auth:          s.Auth,
		SandboxConfig: s.Pod,
	}
	if s.Hint == HintAuto {
		s.Hint = n.opts.PullHint
	}
	switch s.Hint {
	case HintImageSpec:
		req.Image.RuntimeHandler = s.Handler
	case HintAnnotation:
		c := &runtimeapi.PodSandboxConfig{}
		if s.Pod != nil {
			c = proto.CloneOf(s.Pod)
		}
		c.Annotations = maps.Clone(c.Annotations)
		if c.Annotations == nil {
			c.Annotations = map[string]string{}
		}
		c.Annotations[handlerAnnotation] = s.Handler
		req.SandboxConfig = c
	}
	r, err := n.Images.PullImage(ctx, req)
	if err != nil {
		return "", fmt.Errorf("PullImage %s: %w", s.Image, err)
	}
	return r.GetImageRef(), nil
}

// Pull pulls an image for the pod, with the hint of the node's options.
func (p *Pod) Pull(ctx context.Context, image string) (string, error) {
	return p.pull(ctx, image, nil)
}

func (p *Pod) pull(ctx context.Context, image string, auth *runtimeapi.AuthConfig) (string, error) {
	return p.node.Pull(ctx, PullSpec{
		Image:       image,
		Auth:        auth,
		Handler:     p.Handler,
		Pod:         p.Config,
		Annotations: p.Config.Annotations,
	})
}

// ImageStatus returns what CRI knows of an image, or nil when it is absent.
func (n *Node) ImageStatus(ctx context.Context, image string) (*runtimeapi.Image, error) {
	r, err := n.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return r.GetImage(), wrap("ImageStatus "+image, err)
}

// RemoveImage removes an image over CRI.
func (n *Node) RemoveImage(ctx context.Context, image string) error {
	_, err := n.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return wrap("RemoveImage "+image, err)
}

// ContainerSpec is what a test says of a container, in the words of a pod's
// manifest.
type ContainerSpec struct {
	// Name is unique to the container when it is "".
	Name string
	// Image is the reference as the pod's author writes it.
	Image      string
	Command    []string
	Args       []string
	WorkingDir string
	Env        map[string]string
	// PullPolicy and Auth are for Pod.Run.
	PullPolicy PullPolicy
	Auth       *runtimeapi.AuthConfig
	// RunAsUser and RunAsGroup are those of the security context.
	RunAsUser, RunAsGroup *int64
	Mounts                []*runtimeapi.Mount
}

// Container is a container of a pod.
type Container struct {
	ID     string
	Pod    *Pod
	Config *runtimeapi.ContainerConfig

	node *Node
}

// containerConfig is the config that kubelet makes of a container, once it has
// the image and the image's user.
func (p *Pod) containerConfig(s ContainerSpec, imageRef string, user imageUser) *runtimeapi.ContainerConfig {
	if s.Name == "" {
		s.Name = fmt.Sprintf("c-%d", serial.Add(1))
	}
	sc := &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined},
	}
	if s.RunAsUser != nil {
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *s.RunAsUser}
	} else {
		if user.uid != nil {
			sc.RunAsUser = &runtimeapi.Int64Value{Value: *user.uid}
		}
		sc.RunAsUsername = user.name
	}
	if s.RunAsGroup != nil {
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: *s.RunAsGroup}
	}
	c := &runtimeapi.ContainerConfig{
		Metadata:   &runtimeapi.ContainerMetadata{Name: s.Name},
		Image:      &runtimeapi.ImageSpec{Image: imageRef, UserSpecifiedImage: s.Image},
		Command:    s.Command,
		Args:       s.Args,
		WorkingDir: s.WorkingDir,
		Mounts:     s.Mounts,
		Labels: map[string]string{
			"io.kubernetes.container.name": s.Name,
			"io.kubernetes.pod.name":       p.Config.Metadata.Name,
			"io.kubernetes.pod.namespace":  p.Config.Metadata.Namespace,
			"io.kubernetes.pod.uid":        p.Config.Metadata.Uid,
		},
		Annotations: map[string]string{"io.kubernetes.container.restartCount": "0"},
		LogPath:     s.Name + "/0.log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
			SecurityContext: sc,
		},
	}
	for k, v := range s.Env {
		c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: k, Value: []byte(v)})
	}
	return c
}

// CreateFrom creates a container from a config.
func (p *Pod) CreateFrom(ctx context.Context, c *runtimeapi.ContainerConfig) (*Container, error) {
	if err := os.MkdirAll(filepath.Dir(filepath.Join(p.Config.LogDirectory, c.LogPath)), 0o755); err != nil {
		return nil, err
	}
	r, err := p.node.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.ID, Config: c, SandboxConfig: p.Config,
	})
	if err != nil {
		return nil, fmt.Errorf("CreateContainer %s: %w", c.Metadata.Name, err)
	}
	return &Container{ID: r.GetContainerId(), Pod: p, Config: c, node: p.node}, nil
}

// Start starts the container.
func (c *Container) Start(ctx context.Context) error {
	_, err := c.node.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID})
	return wrap("StartContainer", err)
}

// Stop stops the container: SIGTERM, and SIGKILL after the timeout.
func (c *Container) Stop(ctx context.Context, timeout time.Duration) error {
	_, err := c.node.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID, Timeout: int64(timeout.Seconds())})
	return wrap("StopContainer", err)
}

// Remove removes the container, running or not.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.node.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID})
	return wrap("RemoveContainer", err)
}

// Status returns the container's state.
func (c *Container) Status(ctx context.Context) (*runtimeapi.ContainerStatus, error) {
	r, err := c.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
	return r.GetStatus(), wrap("ContainerStatus", err)
}

// Stats returns the container's resource usage.
func (c *Container) Stats(ctx context.Context) (*runtimeapi.ContainerStats, error) {
	r, err := c.node.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.ID})
	return r.GetStats(), wrap("ContainerStats", err)
}

// Exec runs a command in the container and returns its standard output. A
// command that fails is an error that has its standard error.
func (c *Container) Exec(ctx context.Context, cmd ...string) (string, error) {
	r, err := c.node.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: cmd, Timeout: 30})
	if err != nil {
		return "", fmt.Errorf("ExecSync %s: %w", strings.Join(cmd, " "), err)
	}
	if r.ExitCode != 0 {
		return string(r.Stdout), fmt.Errorf("%s: exit status %d: %s", strings.Join(cmd, " "), r.ExitCode, r.Stderr)
	}
	return string(r.Stdout), nil
}

// Logs returns what the container has printed so far, both streams together.
func (c *Container) Logs() (string, error) {
	b, err := os.ReadFile(filepath.Join(c.Pod.Config.LogDirectory, c.Config.LogPath))
	if err != nil {
		return "", err
	}
	// Each line is "<time> <stream> <F or P> <text>"; P says that the line goes
	// on in the next entry.
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 {
			return out.String(), fmt.Errorf("not a line of a CRI log: %q", line)
		}
		if f[2] == "P" {
			f[3] = strings.TrimSuffix(f[3], "\n")
		}
		out.WriteString(f[3])
	}
	return out.String(), nil
}

// WaitLogs waits until the container has printed a text and returns all that it
// has printed.
func (c *Container) WaitLogs(ctx context.Context, text string) (string, error) {
	var logs string
	err := poll(ctx, func() error {
		var err error
		if logs, err = c.Logs(); err == nil && !strings.Contains(logs, text) {
			err = fmt.Errorf("container %s has not printed %q but %q", c.Config.Metadata.Name, text, logs)
		}
		return err
	})
	return logs, err
}

// Wait waits for the container's end and returns its exit code.
func (c *Container) Wait(ctx context.Context) (int32, error) {
	var code int32
	err := poll(ctx, func() error {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		code = s.ExitCode
		if s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container %s has not ended: %s", c.Config.Metadata.Name, s.State)
		}
		return nil
	})
	return code, err
}

// poll calls f until it succeeds or the context, or else half a minute, is over,
// and then returns f's last error.
func poll(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

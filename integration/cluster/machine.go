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

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"time"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/machine"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// MachineOptions says what a [Machine] is made of.
type MachineOptions struct {
	// Root is a Debian root file system, see [machine.Options].
	Root string
	// Package is the .deb with this project's containerd.
	Package string
	// Guest is the stand-in guest, the program.
	Guest string
	// Dir is where the machine's files are.
	Dir string
	// Registry is where images come from, the one for sandboxes too. It listens on
	// 127.0.0.1.
	Registry *registry.Registry
	// Accelerator is QEMU's.
	Accelerator string
	// Config is more of containerd's configuration, version 3.
	Config string
	// Files are put into the machine as well.
	Files map[string]machine.File
}

// Machine is a Kubernetes node that is a machine of its own: systemd runs containerd,
// as its package does it, and kubelet, which has systemd make the pods' cgroups.
type Machine struct {
	*machine.Machine
	// Kubelet has what asks kubelet, kube-apiserver or containerd. Its methods that
	// start, stop or look at files are not for this one.
	*Kubelet
}

// Places in the machine.
const (
	kubernetesDir    = "/etc/kubernetes"
	containerdSocket = "/run/containerd/containerd.sock"
	// ContainerdRoot is where containerd has its data in a [Machine].
	ContainerdRoot = "/var/lib/containerd"
	// GuestProgram is where the stand-in guest is in a [Machine].
	guestProgram = "/usr/local/bin/containerd-shim-guest-v2"
	guestConfig  = "/etc/guest.json"
)

// StartMachine makes a machine with a kubelet and boots it. It returns when the node
// is registered. The handler [harness.Guest] is there and pulls in the guest when
// "containerd guest-pull enable" has said so. The caller has to Close it.
func (c *Control) StartMachine(ctx context.Context, o MachineOptions) (_ *Machine, err error) {
	c.kubelets++
	ip := net.IPv4(127, 0, 1, byte(c.kubelets))
	k := &Kubelet{Name: ip.String(), control: c}
	if k.port, err = freePort(ip); err != nil {
		return nil, err
	}
	if k.client, err = c.kubeletClient(); err != nil {
		return nil, err
	}
	if err := c.ca.server("kubelet-"+k.Name, ip); err != nil {
		return nil, err
	}
	pause, err := harness.PushPause(o.Registry)
	if err != nil {
		return nil, err
	}
	files, err := c.machineFiles(k, o, pause)
	if err != nil {
		return nil, err
	}
	maps.Copy(files, o.Files)
	server, err := url.Parse(c.API.url)
	if err != nil {
		return nil, err
	}
	_, registryPort, err := net.SplitHostPort(o.Registry.Host())
	if err != nil {
		return nil, err
	}
	m := &Machine{Kubelet: k}
	m.Machine, err = machine.Start(ctx, machine.Options{
		Root: o.Root, Dir: o.Dir, Files: files, Accelerator: o.Accelerator,
		Install: "dpkg --install /root/package.deb >/dev/null\nrm /root/package.deb\nsystemctl --quiet enable kubelet.service\n",
		Forward: []string{net.JoinHostPort(k.Name, k.port)},
		Reach:   []string{server.Port(), registryPort},
	})
	if err != nil {
		return nil, err
	}
	k.Node, err = harness.Remote(func(ctx context.Context) (net.Conn, error) { return m.Dial(ctx, "unix", containerdSocket) })
	if err == nil {
		err = m.Ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, m.Machine.Close())
	}
	return m, nil
}

func (c *Control) machineFiles(k *Kubelet, o MachineOptions, pause string) (map[string]machine.File, error) {
	port, err := strconv.Atoi(k.port)
	if err != nil {
		return nil, err
	}
	kubelet, err := json.MarshalIndent(map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"cgroupDriver":             "systemd",
		"port":                     port,
		"tlsCertFile":              filepath.Join(kubernetesDir, "kubelet.crt"),
		"tlsPrivateKeyFile":        filepath.Join(kubernetesDir, "kubelet.key"),
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": false},
			"x509":      map[string]any{"clientCAFile": filepath.Join(kubernetesDir, "ca.crt")},
		},
		"authorization": map[string]any{"mode": "AlwaysAllow"},
		// An emulated machine takes its time.
		"runtimeRequestTimeout": "5m",
		// A change of the node's status is seen sooner.
		"nodeStatusUpdateFrequency": "5s",
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	guest, err := json.Marshal(map[string]any{"systemd_cgroup": true, "pull_timeout": "5m"})
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  options.SystemdCgroup = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = %q
`, pause, harness.Guest, harness.StandIn)
	service := fmt.Sprintf(`[Unit]
After=containerd.service network.target
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/local/bin/kubelet --config=%[1]s/kubelet.json --kubeconfig=%[1]s/kubeconfig --hostname-override=%[2]s
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
`, kubernetesDir, k.Name)
	return map[string]machine.File{
		"/root/package.deb":                                   {Copy: o.Package},
		"/usr/local/bin/kubelet":                              {Copy: c.bin.path("kubelet"), Mode: 0o755},
		guestProgram:                                          {Copy: o.Guest, Mode: 0o755},
		guestConfig:                                           {Text: string(guest)},
		kubernetesDir + "/kubelet.json":                       {Text: string(kubelet)},
		kubernetesDir + "/kubeconfig":                         {Text: c.kubeconfig(kubernetesDir + "/ca.crt"), Mode: 0o600},
		kubernetesDir + "/ca.crt":                             {Copy: c.ca.crt("ca")},
		kubernetesDir + "/kubelet.crt":                        {Copy: c.ca.crt("kubelet-" + k.Name)},
		kubernetesDir + "/kubelet.key":                        {Copy: c.ca.keyFile("kubelet-" + k.Name), Mode: 0o600},
		"/etc/systemd/system/kubelet.service":                 {Text: service},
		"/etc/containerd/conf.d/90-test.toml":                 {Text: conf + o.Config},
		"/etc/systemd/system/containerd.service.d/guest.conf": {Text: "[Service]\nEnvironment=GUEST_CONFIG=" + guestConfig + "\n"},
	}, nil
}

// machineTimeout is how long a kubelet in an emulated machine may take to start.
const machineTimeout = 5 * time.Minute

// Ready returns when kubelet serves and its node is there and ready to run pods.
func (m *Machine) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	for {
		_, err := m.get(ctx, "/healthz")
		if err == nil {
			node, nodeErr := m.control.API.Node(ctx, m.Name)
			if err = nodeErr; err == nil && node.Status.NodeInfo.ContainerRuntimeVersion == "" {
				err = errors.New("the node has no status yet")
			}
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			log, logErr := m.Run(context.WithoutCancel(ctx), "journalctl --no-pager -n 30 -u kubelet -u containerd")
			return errors.Join(fmt.Errorf("kubelet in the machine is not ready: %w\n%s", err, log), logErr)
		case <-time.After(time.Second):
		}
	}
}

// Close ends the machine and removes its node. Its files stay.
func (m *Machine) Close(ctx context.Context) error {
	err := m.control.API.deleteNode(ctx, m.Name)
	if IsNotFound(err) {
		err = nil
	}
	return errors.Join(err, m.Node.Disconnect(), m.Machine.Close())
}

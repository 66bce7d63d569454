wire [7:0] unused = a; wire [3:0] b; assign b[2:0] = 0; assign q = a + 1;
endmodule
